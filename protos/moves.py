"""How KV blocks travel between the pool, host memory and disk, on the scheduler's orders.

Orders ride in step plans; every rank moves its own heads and layers of the block and answers for
itself, because a move may take longer than a step. A move has happened when all ranks say so.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

DIGEST_BYTES = 32


class MoveKind(IntEnum):
    """From where to where."""

    STORE = 0
    """Pool to host memory: read before the plan that orders it writes anything."""
    LOAD = 1
    """Host memory to pool, while later plans go on; none of them names the block before the answer."""
    WRITE = 2
    """Host memory to disk."""
    READ = 3
    """Disk to pool, as `LOAD`."""
    DROP = 4
    """Off the disk."""


class Move(msgspec.Struct, frozen=True, array_like=True):
    """One block's move. Slots are places of host memory, numbered from 0 on every rank alike."""

    number: int
    """Names the move in reports; unique for the life of the group."""
    kind: MoveKind
    digest: bytes
    """Of the block's prefix, `DIGEST_BYTES` long."""
    block: int = -1
    slot: int = -1


class Moved(msgspec.Struct, frozen=True, array_like=True):
    """A move has ended on one rank."""

    number: int
    seconds: float
    """Spent on it, without waiting for its turn."""
    error: str = ""
    """Why it failed; a block that was to be loaded then holds anything."""


class MoveReport(msgspec.Struct, frozen=True, array_like=True, tag="moved"):
    """What one rank says of moves that have ended, in any order."""

    moved: list[Moved]
