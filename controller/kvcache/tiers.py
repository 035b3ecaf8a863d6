"""What lies below the KV pool of one replica: host memory and disk, as books of the scheduler.

::

    pool --STORE--> host memory --WRITE--> disk
      ^---- LOAD ------'                     |
      ^---- READ ----------------------------'

A block is copied down once its last user has gone, the soonest evicted first, so that eviction
costs nothing; one that is evicted earlier is stored by the very plan that gives its memory away, if
that plan still may. What is on disk is mostly in host memory too, until it is the least recently
used there. Ranks only carry out orders: a move has happened when every rank says so, and has failed
when one says so.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from phalanx.protos.errors import GroupLost
from phalanx.protos.moves import Move, Moved, MoveKind

from .blocks import require
from .changes import Tier
from .host import HostSlots

MOST_WRITES = 16
"""Files that are being written at a time: the others of a rank's moves come in between."""
MOST_FAILED_WRITES = 8
"""One after the other, until nothing is written any more: the disk is full, or gone."""


class Ended(NamedTuple):
    """A move that all ranks have answered."""

    move: Move
    seconds: float
    """Of the slowest rank."""
    error: str
    """Of the first rank that failed, empty if none did."""


@dataclass(slots=True)
class _Open:
    move: Move
    left: int
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Figures of the tiers. Blocks are as of now, the rest counts from birth."""

    host_total: int = 0
    host_used: int = 0
    disk_total: int = 0
    disk_used: int = 0
    stored: int = 0
    """Blocks copied from the pool to host memory."""
    written: int = 0
    """From there to disk."""
    loaded_host: int = 0
    """Blocks copied back into the pool from host memory."""
    loaded_disk: int = 0
    load_s: float = 0.0
    """Seconds that ranks spent on copying back."""
    failed: int = 0
    """Moves that failed on some rank: damaged blocks, full disks."""
    refused: int = 0
    """Files that were found on disk at the start and could not be used."""
    block_tokens: int = 0
    block_bytes: int = 0
    """Of all ranks together."""
    declined: int = 0
    """Blocks that were there and were recomputed, because that was predicted to be faster."""


class LowerTiers:
    """What host memory and disk hold of one replica's blocks, by digest, and the orders to ranks."""

    def __init__(
        self,
        *,
        num_ranks: int,
        host_slots: int,
        disk_slots: int = 0,
        on_disk: Iterable[bytes] = (),
        strays: Iterable[bytes] = (),
        refused: int = 0,
        block_tokens: int = 0,
        block_bytes: int = 0,
    ) -> None:
        """on_disk: what every rank has found there, the least recently written first. strays: what
        only some have found; it is dropped. refused: files that could not be used. block_tokens, block_bytes: of
        a block on all ranks, for the figures."""
        self._num_ranks, self._disk_slots = num_ranks, disk_slots
        self._block_tokens, self._block_bytes = block_tokens, block_bytes
        self.on_change: Callable[[bytes], None] = lambda digest: None
        """Told of digests that host memory or disk has come to hold, or no longer holds."""
        self._host = HostSlots(host_slots, lambda digest: self.on_change(digest))
        self._disk: OrderedDict[bytes, None] = OrderedDict.fromkeys(on_disk)
        self._reading: Counter[bytes] = Counter()
        self._writing: dict[bytes, bool] = {}
        """Digest -> whether it is still wanted."""
        self._offered: OrderedDict[int, bytes] = OrderedDict()
        """Blocks of the pool whose content is not in host memory, the soonest evicted first."""
        self._orders: list[Move] = []
        self._open: dict[int, _Open] = {}
        self._next = 0
        self._stores_left = 0
        self._failed_writes = 0
        self._refused, self._declined, self._failed = refused, 0, 0
        self._load_s = 0.0
        self._ended: Counter[MoveKind] = Counter()
        for digest in strays:
            self._order(MoveKind.DROP, digest)
        while len(self._disk) > disk_slots:
            self._drop_oldest()

    # --- what there is ---

    def tier(self, digest: bytes) -> Tier:
        """The fastest of these tiers that holds the block."""
        if self._host.find(digest) is not None:
            return Tier.HOST
        return Tier.DISK if digest in self._disk else Tier.NONE

    def contents(self) -> Iterator[tuple[bytes, Tier]]:
        """All that is held, with the fastest tier."""
        yield from ((digest, Tier.HOST) for digest in self._host)
        on_disk = (digest for digest in self._disk if self._host.find(digest) is None)
        yield from ((digest, Tier.DISK) for digest in on_disk)

    @property
    def is_waiting(self) -> bool:
        """Whether ranks owe an answer."""
        return bool(self._open)

    @property
    def has_orders(self) -> bool:
        """Whether the next plan would move something."""
        may_store = bool(self._offered) and self._host.has_room
        return bool(self._orders) or may_store or self._may_write

    def stats(self) -> TierStats:
        """Figures as of now. O(1)."""
        return TierStats(
            host_total=self._host.num_slots,
            host_used=len(self._host),
            disk_total=self._disk_slots,
            disk_used=len(self._disk),
            stored=self._ended[MoveKind.STORE],
            written=self._ended[MoveKind.WRITE],
            loaded_host=self._ended[MoveKind.LOAD],
            loaded_disk=self._ended[MoveKind.READ],
            load_s=self._load_s,
            failed=self._failed,
            refused=self._refused,
            declined=self._declined,
            block_tokens=self._block_tokens,
            block_bytes=self._block_bytes,
        )

    def decline(self, count: int) -> None:
        """So many blocks that are here are recomputed."""
        self._declined += count

    # --- the pool's blocks ---

    def offer(self, digest: bytes, block: int) -> None:
        """An indexed block has lost its last user."""
        self._offered.pop(block, None)
        if self._host.find(digest) is None:
            self._offered[block] = digest
        else:
            self._host.touch(digest)

    def evict(self, digest: bytes, block: int) -> None:
        """The block is about to hold something else, from the plan in the making on."""
        if self._offered.pop(block, None) is not None and self._stores_left > 0:
            self._store(digest, block, self._host.take(at_any_price=True))

    def forget(self, digest: bytes, block: int | None) -> None:
        """The content is broken, wherever it is. block: of the pool, if one holds it."""
        if block is not None:
            self._offered.pop(block, None)
        self._host.forget(digest)
        self._forget_disk(digest)
        if digest in self._writing:
            self._writing[digest] = False

    # --- orders ---

    def begin_plan(self, most_stores: int) -> None:
        """A plan is being made, which may store so many blocks."""
        self._stores_left = most_stores

    def claim(self, digest: bytes) -> int:
        """Keep a block that is here until the load that is about to be ordered has ended; its slot,
        or -1 on disk."""
        slot = self._host.find(digest)
        if slot is None:
            self._disk.move_to_end(digest)
            self._reading[digest] += 1
            return -1
        self._host.touch(digest)
        self._host.pin(slot)
        return slot

    def load(self, digest: bytes, block: int, slot: int) -> int:
        """Order that the block be filled from where `claim` said; the number of the move."""
        kind = MoveKind.READ if slot < 0 else MoveKind.LOAD
        return self._order(kind, digest, block, slot)

    def take_orders(self) -> list[Move]:
        """The moves of the plan that is being finished."""
        while self._offered and self._stores_left > 0 and self._host.has_room:
            block, digest = self._offered.popitem(last=False)
            if self._host.find(digest) is None:
                self._store(digest, block, self._host.take())
        while self._may_write:
            if len(self._disk) + len(self._writing) >= self._disk_slots:
                self._drop_oldest()
            digest, slot = self._host.next_unwritten()
            self._writing[digest] = True
            self._order(MoveKind.WRITE, digest, slot=slot)
        self._stores_left = 0
        orders, self._orders = self._orders, []
        return orders

    def _order(self, kind: MoveKind, digest: bytes, block: int = -1, slot: int = -1) -> int:
        move = Move(self._next, kind, digest, block, slot)
        self._next += 1
        self._orders.append(move)
        self._open[move.number] = _Open(move, self._num_ranks)
        return move.number

    def _store(self, digest: bytes, block: int, slot: int | None) -> None:
        if slot is not None:
            self._stores_left -= 1
            self._host.put(digest, slot)
            self._order(MoveKind.STORE, digest, block, slot)

    @property
    def _may_write(self) -> bool:
        # with fewer writes and reads than files, there is one to drop for the next
        busy = len(self._writing) + len(self._reading)
        few = len(self._writing) < MOST_WRITES and busy < self._disk_slots
        return few and self._host.has_unwritten

    def _drop_oldest(self) -> None:
        digest = next((held for held in self._disk if held not in self._reading), None)
        if digest is not None:
            self._forget_disk(digest)

    def _forget_disk(self, digest: bytes) -> None:
        if digest in self._disk:
            del self._disk[digest]
            self._order(MoveKind.DROP, digest)
            self.on_change(digest)

    # --- answers ---

    def settle(self, moved: Moved) -> Ended | None:
        """One rank's answer. Says how the move has ended if no other rank's is missing."""
        entry = self._open.get(moved.number)
        if entry is None:
            raise GroupLost(f"a rank answered move {moved.number}, which is not open")
        entry.left -= 1
        entry.seconds = max(entry.seconds, moved.seconds)
        entry.error = entry.error or moved.error
        if entry.left:
            return None
        del self._open[moved.number]
        ended = Ended(entry.move, entry.seconds, entry.error)
        self._close(ended)
        return ended

    def _close(self, ended: Ended) -> None:
        move, failed = ended.move, bool(ended.error)
        if move.slot >= 0:
            self._host.unpin(move.slot)
        self._failed += failed
        self._ended[move.kind] += not failed
        here = self._host.find(move.digest) == move.slot
        if move.kind is MoveKind.STORE:
            if failed and here:
                self._host.forget(move.digest)
            elif here:
                self._keep(move.digest)
        elif move.kind is MoveKind.WRITE:
            self._end_write(move.digest, failed=failed)
        elif move.kind is MoveKind.LOAD:
            self._load_s += ended.seconds
            if failed and here:
                self._host.forget(move.digest)
        elif move.kind is MoveKind.READ:
            self._load_s += ended.seconds
            self._reading -= Counter((move.digest,))
            if failed:
                self._forget_disk(move.digest)

    def _keep(self, digest: bytes) -> None:
        """A block stands in host memory: is it to go to disk?"""
        writes = self._disk_slots > 0 and self._failed_writes < MOST_FAILED_WRITES
        absent = digest not in self._disk and digest not in self._writing
        self._host.keep(digest, write=writes and absent)

    def _end_write(self, digest: bytes, *, failed: bool) -> None:
        wanted = self._writing.pop(digest)
        self._failed_writes = self._failed_writes + 1 if failed else 0
        if self._failed_writes == MOST_FAILED_WRITES:
            self._host.give_up_writing()
        if failed or not wanted:
            self._order(MoveKind.DROP, digest)  # some rank may have it
        else:
            self._disk[digest] = None
            self.on_change(digest)
        if wanted:
            self._host.keep(digest, write=False)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every slot and file is accounted for. O(slots + files)."""
        pins: Counter[int] = Counter()
        reads: Counter[bytes] = Counter()
        for entry in self._open.values():
            if entry.move.slot >= 0:
                pins[entry.move.slot] += 1
            if entry.move.kind is MoveKind.READ:
                reads[entry.move.digest] += 1
        self._host.check_integrity(pins)
        require(reads == self._reading, "reads and open moves disagree")
        files = len(self._disk.keys() | self._writing.keys())
        require(files <= self._disk_slots, f"{files} files, {self._disk_slots} are allowed")
