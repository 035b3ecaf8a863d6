"""This rank's blocks for ranks of other replicas, and theirs for it: see `protos.transfers`.

Bytes move on threads of their own, while the rank goes on with its plans. What keeps that safe is
the order of messages: blocks are offered and taken behind the plans that wrote or read them, and
no plan names them before the step loops have heard that the transfer is over.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from phalanx.protos.errors import GroupLost, TransferFailed
from phalanx.protos.shards import Span, cut_heads, cut_stages
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.transfers import (
    FRAME,
    MAX_FETCH_BYTES,
    NO_BLOCK,
    TRANSFER_TIMEOUT_S,
    Fetch,
    Offer,
    Piece,
    Take,
    Taken,
    Withdraw,
    exchange_key,
    pieces_for,
)

from .cache import PagedCache

MAX_CONNECTIONS = 64
"""That are served at a time; more are closed at once."""
FETCH_TIMEOUT_S = 5.0
"""For a connection to say what it wants."""
KEPT_WITHDRAWN = 1024
_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Fetch] = msgspec.msgpack.Decoder(Fetch)


@dataclass(slots=True)
class _Offered:
    """A transfer's parts so far. Under the lock, what is offered may be read."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: dict[int, list[int]] = field(default_factory=dict)
    withdrawn: bool = False


class BlockExchange:
    """Hands out and takes in blocks of one rank's pool, whose layers and heads it knows.

    The rank's own thread calls `offer`, `withdraw` and `take`, in the order of its plans.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        rank: int,
        pages: PagedCache,
        secret: bytes,
        host: str,
        *,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> None:
        """secret: of the link to the step loop. Raises `GroupLost` when `host` cannot be bound."""
        self._spec, self._rank, self._pages = spec, rank, pages
        stage, place = divmod(rank, spec.tp_size)
        model = spec.model
        self._layers = cut_stages(model, spec.pp_size)[stage].layers
        self._heads = cut_heads(model.num_heads, model.num_kv_heads, spec.tp_size, place).kv
        self._key, self._timeout_s = exchange_key(secret), timeout_s
        self._offers: dict[int, _Offered] = {}
        self._withdrawn: deque[int] = deque(maxlen=KEPT_WITHDRAWN)
        self._news = threading.Condition()
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        try:
            self._listener = socket.create_server((host, 0), backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise GroupLost(f"{host} cannot be bound for blocks: {error.strerror}") from None
        _start(self._accept, "exchange")

    @property
    def address(self) -> tuple[str, int]:
        """Where other ranks ask."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Hand out nothing more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._news:
            transfers = list(self._offers)
        for transfer in transfers:
            self.withdraw(Withdraw(transfer))

    # --- the source ---

    def offer(self, offer: Offer) -> None:
        """Let blocks be read from now on."""
        with self._news:
            self._offers.setdefault(offer.transfer, _Offered()).parts[offer.part] = offer.blocks
            self._news.notify_all()

    def withdraw(self, message: Withdraw) -> None:
        """End a transfer's reading; returns when nobody reads any more."""
        with self._news:
            offered = self._offers.pop(message.transfer, None)
            self._withdrawn.append(message.transfer)
            self._news.notify_all()
        if offered is not None:
            with offered.lock:
                offered.withdrawn = True

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._free.acquire(blocking=False):
                _start(self._serve, "exchange-out", connection)
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._answer(connection)
        except (OSError, TransferFailed):
            return  # the other side sees its connection end
        finally:
            self._free.release()

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(FETCH_TIMEOUT_S)
        fetch = _read_fetch(connection)
        self._check(fetch)
        connection.settimeout(self._timeout_s)
        layers = Span(*(layer - self._layers.start for layer in fetch.layers))
        heads = Span(*(head - self._heads.start for head in fetch.heads))
        for part in range(fetch.parts):
            offered, blocks = self._await(fetch.transfer, part)
            for position in fetch.wanted if part == 0 else range(len(blocks)):
                if not 0 <= position < len(blocks):
                    raise TransferFailed(f"position {position} of {len(blocks)} was asked for")
                data = memoryview(b"")
                if blocks[position] != NO_BLOCK:
                    with offered.lock:
                        if offered.withdrawn:
                            return
                        data = self._pages.read_piece(blocks[position], layers, heads)
                connection.sendall(FRAME.pack(part, position, len(data), zlib.crc32(data)))
                connection.sendall(data)

    def _check(self, fetch: Fetch) -> None:
        """Raise `TransferFailed` unless this asks our group for what we hold."""
        if not hmac.compare_digest(fetch.key, self._key) or fetch.epoch != self._spec.epoch:
            raise TransferFailed("a fetch for another group of ranks")
        for wanted, held in ((fetch.layers, self._layers), (fetch.heads, self._heads)):
            if not held.start <= wanted.start < wanted.stop <= held.stop:
                raise TransferFailed(f"a fetch of {wanted}, this rank has {held}")
        size = self._pages.piece_bytes(fetch.layers.size, fetch.heads.size)
        if (fetch.piece_bytes, fetch.layout) != (size, self._pages.layout):
            raise TransferFailed("a fetch for blocks of another layout")

    def _await(self, transfer: int, part: int) -> tuple[_Offered, list[int]]:
        """A part, once it is offered."""
        deadline = time.monotonic() + self._timeout_s
        with self._news:
            while True:
                if transfer in self._withdrawn:
                    raise TransferFailed("withdrawn")
                offered = self._offers.get(transfer)
                if offered is not None and part in offered.parts:
                    return offered, offered.parts[part]
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TransferFailed("nothing was offered")
                self._news.wait(left)

    # --- the target ---

    def take(self, take: Take, answer: Callable[[Taken], None]) -> None:
        """Fetch blocks; `answer` is told of each part, or of an error, on another thread."""
        _start(self._take, "exchange-in", take, answer)

    def _take(self, take: Take, answer: Callable[[Taken], None]) -> None:
        part = 0
        with contextlib.ExitStack() as stack, contextlib.suppress(GroupLost):
            try:
                sources = self._ask(take, stack)
                for part, blocks in enumerate(take.parts):
                    count = sum(self._receive(part, blocks, *source) for source in sources)
                    answer(Taken(take.transfer, part, count))
            except OSError as error:
                answer(Taken(take.transfer, part, error=error.strerror or type(error).__name__))
            except (TransferFailed, IndexError) as error:
                answer(Taken(take.transfer, part, error=str(error)))

    def _ask(self, take: Take, stack: contextlib.ExitStack) -> list[tuple[socket.socket, Piece]]:
        """Connections to the ranks that hold what this one needs."""
        spec, source = self._spec, take.source
        pieces = pieces_for(
            spec.model, (spec.tp_size, spec.pp_size, self._rank), (source.tp_size, source.pp_size)
        )
        wanted = [position for position, block in enumerate(take.parts[0]) if block != NO_BLOCK]
        sources = []
        for piece in pieces:
            address = source.addresses[piece.rank]
            connection = socket.create_connection(address, self._timeout_s)
            stack.enter_context(connection)
            fetch = Fetch(
                source.key,
                source.epoch,
                take.transfer,
                piece.layers,
                piece.heads,
                self._pages.layout,
                self._pages.piece_bytes(piece.layers.size, piece.heads.size),
                wanted,
                len(take.parts),
            )
            body = _encoder.encode(fetch)
            connection.sendall(_LENGTH.pack(len(body)) + body)
            sources.append((connection, piece))
        return sources

    def _receive(
        self, part: int, blocks: Sequence[int], connection: socket.socket, piece: Piece
    ) -> int:
        """Fill a part from one rank of the source; the bytes that came."""
        layers = Span(*(layer - self._layers.start for layer in piece.layers))
        heads = Span(*(head - self._heads.start for head in piece.heads))
        buffer = bytearray(self._pages.piece_bytes(layers.size, heads.size))
        received = 0
        for position, block in enumerate(blocks):
            if part == 0 and block == NO_BLOCK:
                continue
            found = FRAME.unpack(_read_exactly(connection, bytearray(FRAME.size)))
            if found[:2] != (part, position) or found[2] not in (0, len(buffer)):
                raise TransferFailed(f"frame {found[:3]} came for position {position}")
            if not found[2]:
                continue
            _read_exactly(connection, buffer)
            if zlib.crc32(buffer) != found[3]:
                raise TransferFailed(f"the checksum of position {position} is wrong")
            if block == NO_BLOCK:
                raise TransferFailed(f"there is no place for position {position}")
            self._pages.write_piece(block, layers, heads, buffer)
            received += len(buffer)
        return received


def _start(target: Callable[..., None], name: str, *arguments: object) -> None:
    threading.Thread(target=target, name=name, args=arguments, daemon=True).start()


def _read_exactly(connection: socket.socket, buffer: bytearray) -> bytearray:
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise TransferFailed("the source closed its connection")
        view = view[count:]
    return buffer


def _read_fetch(connection: socket.socket) -> Fetch:
    (size,) = _LENGTH.unpack(_read_exactly(connection, bytearray(_LENGTH.size)))
    if size > MAX_FETCH_BYTES:
        raise TransferFailed(f"a fetch of {size} bytes, at most {MAX_FETCH_BYTES} are allowed")
    try:
        return _decoder.decode(_read_exactly(connection, bytearray(size)))
    except msgspec.MsgspecError as error:
        raise TransferFailed(f"not a fetch: {error}") from error
