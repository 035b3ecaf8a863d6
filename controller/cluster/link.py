"""The sockets between one step loop and its ranks: ours, so that no step is an actor call.

Ranks connect to us and say who they are, with the group's secret; whatever else connects is
dropped. One rank answers the plans; the other ranks' sockets speak only of trouble.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Callable

from phalanx.protos.errors import ConfigError, GroupLost, ModelError, PhalanxError
from phalanx.protos.moves import MoveReport
from phalanx.protos.specs import LoadReport, WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult
from phalanx.protos.transfers import Exchange, Offer, Take, Taken, Withdraw, exchange_key
from phalanx.protos.wire import (
    Beat,
    Failed,
    Hello,
    Progress,
    Start,
    Stop,
    encode,
    read_from_rank,
)

HELLO_BYTES = 1024
HELLO_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 3.0
PEER_S = 0.2
"""For the death of a rank to be heard, whose peers complain of it."""
LISTEN_S = 0.25  # between two looks at who has been silent
_KNOWN_ERRORS: dict[str, type[PhalanxError]] = {
    "ModelError": ModelError,
    "ConfigError": ConfigError,
}

_Message = LoadReport | Progress | StepResult | Hello


class RankLinks:
    """One connection per rank. Used by one thread at a time."""

    def __init__(
        self,
        size: int,
        epoch: int,
        host: str = "127.0.0.1",
        *,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
    ) -> None:
        """silence_timeout_s: a loaded rank that says nothing for so long is lost."""
        self.secret = secrets.token_bytes(32)
        self._silence_timeout_s = silence_timeout_s
        self._heard: dict[int, float] = {}
        self._moves: list[tuple[int, MoveReport]] = []
        self._loaded = False
        self._answering = 0
        self._size, self._epoch = size, epoch
        try:
            self._listener = socket.create_server((host, 0), backlog=max(size, 8))
        except OSError as error:
            raise GroupLost(f"{host} cannot be bound for the ranks: {error.strerror}") from None
        self._ranks: list[socket.socket | None] = [None] * size
        self._selector = selectors.DefaultSelector()
        self._taken: list[tuple[int, Taken]] = []
        self._exchange: Exchange | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that ranks connect to."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def accept(self, timeout_s: float, alive: Callable[[], None] = lambda: None) -> None:
        """Wait for every rank. `alive` is called now and then and raises if one has died."""
        deadline = time.monotonic() + timeout_s
        while None in self._ranks:
            alive()
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [rank for rank, link in enumerate(self._ranks) if link is None]
                raise GroupLost(f"ranks {missing} did not connect within {timeout_s:g} s")
            self._listener.settimeout(min(left, 0.2))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._welcome(connection)
        self._listener.close()

    def _welcome(self, connection: socket.socket) -> None:
        """Take the connection in if it knows the secret, else drop it."""
        connection.settimeout(HELLO_TIMEOUT_S)
        try:
            hello = read_from_rank(connection, HELLO_BYTES)
        except GroupLost:
            hello = None
        if (
            not isinstance(hello, Hello)
            or not hmac.compare_digest(hello.secret, self.secret)
            or hello.epoch != self._epoch
            or not 0 <= hello.rank < self._size
            or self._ranks[hello.rank] is not None
        ):
            connection.close()
            return
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ranks[hello.rank] = connection
        self._selector.register(connection, selectors.EVENT_READ, hello.rank)

    def load(
        self, spec: WorkerSpec, progress: Callable[[int, int, int], None], timeout_s: float
    ) -> list[LoadReport]:
        """Tell every rank what to build and wait for all reports."""
        self._answering = spec.answering_rank
        self._broadcast(encode(Start(spec)))
        deadline = time.monotonic() + timeout_s
        reports: dict[int, LoadReport] = {}
        while len(reports) < self._size:
            rank, message = self._next(deadline - time.monotonic())
            if isinstance(message, LoadReport):
                reports[rank] = message
            elif isinstance(message, Progress):
                progress(rank, message.done, message.total)
            else:
                raise GroupLost(f"rank {rank} sent {type(message).__name__} while loading")
        self._heard = dict.fromkeys(reports, time.monotonic())
        self._loaded = True
        addresses = [reports[rank].exchange for rank in range(self._size)]
        known = [address for address in addresses if address is not None]
        if len(known) == self._size:
            key = exchange_key(self.secret)
            self._exchange = Exchange(spec.epoch, key, spec.tp_size, spec.pp_size, known)
        return [reports[rank] for rank in range(self._size)]

    @property
    def exchange(self) -> Exchange | None:
        """Where the ranks hand out blocks, if they do."""
        return self._exchange

    def tell(self, message: Offer | Withdraw | Take) -> None:
        """Say something of blocks to every rank, behind the plans sent before."""
        self._broadcast(encode(message))

    def drain_taken(self) -> list[tuple[int, Taken]]:
        """What ranks have said of transfers since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def send(self, plan: StepPlan) -> None:
        """Send a plan to every rank."""
        self._broadcast(encode(plan))

    def receive(self, timeout_s: float) -> StepResult:
        """The next result, from the rank that answers."""
        rank, message = self._next(timeout_s)
        if isinstance(message, StepResult) and rank == self._answering:
            return message
        raise GroupLost(f"rank {rank} sent {type(message).__name__} instead of a result")

    def check(self) -> None:
        """Between steps ranks have nothing to say but that they live. Does not wait."""
        while ready := self._selector.select(0):
            rank, message = self._read(ready)
            if message is not None:
                raise GroupLost(f"rank {rank} sent {type(message).__name__} unasked")
        self._check_silence()

    def moves(self, timeout_s: float) -> list[tuple[int, MoveReport]]:
        """What ranks have said of moves since the last call; waits so long for the first word,
        between steps."""
        if not self._moves and timeout_s > 0:
            self._selector.select(timeout_s)
            self.check()
        said, self._moves = self._moves, []
        return said

    def _broadcast(self, frame: bytes) -> None:
        for rank, connection in enumerate(self._ranks):
            if connection is None:
                raise GroupLost(f"rank {rank} is not connected")
            try:
                connection.sendall(frame)
            except OSError as error:
                raise self._ended(rank, connection) from error

    def _next(self, timeout_s: float) -> tuple[int, _Message]:
        """The next message of any rank but beats and reports of moves; trouble of any rank ends the
        group."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            ready = self._selector.select(max(min(left, LISTEN_S), 0))
            if ready:
                rank, message = self._read(ready)
                if message is not None:
                    return rank, message
                continue
            # only now: what has been said waits to be read even if we were the ones who slept
            self._check_silence()
            if left <= 0:
                text = f"no rank answered within {timeout_s:.1f} s"
                raise GroupLost(text, crashed=self._loaded)

    def _read(self, ready: list[tuple[selectors.SelectorKey, int]]) -> tuple[int, _Message | None]:
        """One message of one of the sockets that can be read; None for one that is kept here."""
        # a closed or complaining rank goes before a result, so look at the others first
        key = min(ready, key=lambda item: int(item[0].data) == self._answering)[0]
        rank, connection = int(key.data), key.fileobj
        if not isinstance(connection, socket.socket):
            raise GroupLost(f"rank {rank} is not connected")
        try:
            message = read_from_rank(connection)
        except GroupLost as error:
            raise GroupLost(f"rank {rank}: {error}", crashed=error.crashed) from error
        if isinstance(message, Failed):
            raise self._complaint(rank, message)
        self._heard[rank] = time.monotonic()
        if isinstance(message, MoveReport):
            self._moves.append((rank, message))
        elif isinstance(message, Taken):
            self._taken.append((rank, message))
        return rank, None if isinstance(message, MoveReport | Taken | Beat) else message

    def _complaint(self, rank: int, message: Failed) -> PhalanxError:
        """A rank's error; or a peer's death, which is heard here at about the same time as its
        peers complain of it."""
        kind = _KNOWN_ERRORS.get(message.kind, GroupLost)
        if kind is not GroupLost:
            return kind(f"rank {rank}: {message.message}")
        heard, deadline = {rank}, time.monotonic() + PEER_S
        while len(heard) < self._size and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                other, connection = int(key.data), key.fileobj
                if other in heard or not isinstance(connection, socket.socket):
                    self._selector.unregister(key.fileobj)
                    continue
                try:
                    if isinstance(read_from_rank(connection), Failed):
                        heard.add(other)
                except GroupLost as error:
                    return GroupLost(f"rank {other}: {error}", crashed=error.crashed)
        return GroupLost(f"rank {rank}: {message.message}", crashed=True)

    def _ended(self, rank: int, connection: socket.socket) -> PhalanxError:
        """Why a rank takes no more plans, by the last that it has said."""
        connection.settimeout(PEER_S)
        try:
            while not isinstance(message := read_from_rank(connection), Failed):
                continue
        except GroupLost as error:
            return GroupLost(f"rank {rank}: {error}", crashed=error.crashed)
        return self._complaint(rank, message)

    def _check_silence(self) -> None:
        """A process that is stopped, or cut off, closes no socket; it only falls silent."""
        if not self._loaded:
            return
        for rank, heard in self._heard.items():
            silent = time.monotonic() - heard
            if silent > self._silence_timeout_s:
                raise GroupLost(f"rank {rank} has been silent for {silent:.1f} s")

    def close(self) -> None:
        """Ask the ranks to end and close everything."""
        self._listener.close()
        for connection in self._ranks:
            if connection is not None:
                with contextlib.suppress(OSError):
                    connection.settimeout(1.0)
                    connection.sendall(encode(Stop()))
                connection.close()
        self._ranks = [None] * self._size
        self._selector.close()
