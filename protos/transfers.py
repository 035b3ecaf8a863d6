"""KV blocks on their way from the ranks of one replica to those of another.

The step loops say what moves, in the order of their plans; the bytes go from rank to rank, each
rank of the target asking those of the source for its own heads and layers. Both sides compute the
cut, so replicas may differ in the number of ranks and of stages.

A transfer has one part or two: the blocks that are full while their sequence still runs, and those
that follow once it stands still. A block is named by its position in the part.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import NamedTuple

import msgspec

from .errors import TransferFailed
from .shards import Span, cut_heads, cut_stages
from .specs import DecoderSpec

NO_BLOCK = -1
"""In place of a block id: nothing to move at this position."""
MAX_FETCH_BYTES = 1 << 20
MAX_POSITIONS = 1 << 17
"""Of a part: so that a fetch which names them all is within its bound."""
TRANSFER_TIMEOUT_S = 15.0
"""Without a byte from the other rank, after which a transfer has failed."""
FRAME = struct.Struct("<4I")
"""Before a block's bytes: part, position, size in bytes, CRC-32 of the bytes."""


class Exchange(msgspec.Struct, frozen=True, array_like=True):
    """Where a replica's ranks hand out blocks."""

    epoch: int
    key: bytes
    """To be shown by whoever asks; of this group of ranks alone."""
    tp_size: int
    pp_size: int
    addresses: list[tuple[str, int]]
    """By rank."""


class Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer"):
    """To the ranks of the source: these blocks are complete once the plans before this message are
    executed, and stay as they are until `Withdraw`."""

    transfer: int
    part: int
    blocks: list[int]
    """By position; `NO_BLOCK` where there is nothing."""


class Withdraw(msgspec.Struct, frozen=True, array_like=True, tag="withdraw"):
    """To the ranks of the source: no block of the transfer may be read after this message."""

    transfer: int


class Take(msgspec.Struct, frozen=True, array_like=True, tag="take"):
    """To the ranks of the target: fetch blocks; no plan names theirs before `Taken`."""

    transfer: int
    source: Exchange
    parts: list[list[int]]
    """The blocks to fill, by position; `NO_BLOCK` where nothing is wanted."""


class Taken(msgspec.Struct, frozen=True, array_like=True, tag="taken"):
    """From a rank of the target: a part is here, or the transfer has failed. After the last part
    or an error, this rank writes no block of the transfer any more."""

    transfer: int
    part: int
    num_bytes: int = 0
    error: str = ""


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag="fetch"):
    """From a rank of the target to one of the source, its first and only words. The answer is a
    frame for each position wanted: those listed of part 0, and all of a further part."""

    key: bytes
    epoch: int
    transfer: int
    layers: Span
    heads: Span
    """Key/value heads."""
    layout: str
    """Of a head's block in the asking rank's memory."""
    piece_bytes: int
    """Of these layers and heads of a block."""
    wanted: list[int]
    parts: int


def exchange_key(secret: bytes) -> bytes:
    """What opens the exchange of a group's ranks, from the secret of their links to the step loop,
    which other replicas must not learn."""
    return hmac.digest(secret, b"phalanx kv exchange", hashlib.sha256)


class Piece(NamedTuple):
    """What one rank of the source holds of what one rank of the target needs."""

    rank: int
    layers: Span
    heads: Span


def pieces_for(
    model: DecoderSpec,
    target: tuple[int, int, int],
    source: tuple[int, int],
) -> list[Piece]:
    """The pieces of a block that together are all that a rank of the target keeps of it.

    target: (tp size, pp size, rank). source: (tp size, pp size). A head that several ranks of the
    source hold is asked of one of them, in turn by the asking rank's place. Raises
    `TransferFailed` where states stand in place of keys and values.
    """
    if model.state is not None:
        raise TransferFailed("states are not moved between replicas")
    tp_size, pp_size, rank = target
    stage, place = divmod(rank, tp_size)
    own = cut_heads(model.num_heads, model.num_kv_heads, tp_size, place).kv
    layers = cut_stages(model, pp_size)[stage].layers
    pieces = []
    for index, theirs in enumerate(cut_stages(model, source[1])):
        shared = _overlap(layers, theirs.layers)
        if not shared.size:
            continue
        for holder, heads in _holders(model, source[0], own, place):
            pieces.append(Piece(index * source[0] + holder, shared, heads))
    return pieces


def _holders(model: DecoderSpec, size: int, own: Span, turn: int) -> list[tuple[int, Span]]:
    """(place, heads) that make up `own`, each head once."""
    spans = [
        cut_heads(model.num_heads, model.num_kv_heads, size, place).kv for place in range(size)
    ]
    found: list[tuple[int, Span]] = []
    head = own.start
    while head < own.stop:
        able = [place for place, span in enumerate(spans) if span.start <= head < span.stop]
        holder = able[turn % len(able)]
        run = Span(head, min(spans[holder].stop, own.stop))
        found.append((holder, run))
        head = run.stop
    return found


def _overlap(one: Span, other: Span) -> Span:
    start = max(one.start, other.start)
    return Span(start, max(min(one.stop, other.stop), start))
