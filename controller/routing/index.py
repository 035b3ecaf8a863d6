"""Which replica holds which prefix: one view of all replicas' prefix indexes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

from phalanx.controller.kvcache.changes import PrefixUpdate, Tier

PLANE = 1024
"""Replicas at most: bit r of a set says that replica r holds a block, bit PLANE + r that it does so
in host memory only, and bit 2 PLANE + r on disk only."""
_ALL = (1 << PLANE) - 1

from .table import CompactTable


class Lower(NamedTuple):
    """Of the blocks that a replica holds, how many are not in its KV pool."""

    host: int = 0
    disk: int = 0


def _bits(replica: int) -> int:
    """All that sets say of a replica."""
    return 1 << replica | 1 << PLANE + replica | 1 << 2 * PLANE + replica


class HolderSets:
    """Sets of replicas as bit masks, each kept once however many prefixes it holds."""

    def __init__(self) -> None:
        self._id_of: dict[int, int] = {}
        self._masks: list[int] = []
        self._uses: list[int] = []
        self._free: list[int] = []

    def mask(self, number: int) -> int:
        """The set with this number."""
        return self._masks[number]

    def use(self, mask: int, times: int = 1) -> int:
        """The number of a set, which is used once more (or several times)."""
        number = self._id_of.get(mask)
        if number is None:
            if self._free:
                number = self._free.pop()
            else:
                number = len(self._masks)
                self._masks.append(0)
                self._uses.append(0)
            self._id_of[mask], self._masks[number] = number, mask
        self._uses[number] += times
        return number

    def leave(self, number: int) -> None:
        """The set is used once less."""
        self._uses[number] -= 1
        if not self._uses[number]:
            self._discard(number)

    def without(self, replica: int) -> dict[int, int | None]:
        """Take a replica out of every set: old number -> new one, None for no holder at all."""
        bit, moved = 1 << replica, dict[int, int | None]()
        for mask, number in list(self._id_of.items()):
            if mask & bit:
                rest = mask & ~_bits(replica)
                moved[number] = self.use(rest, self._uses[number]) if rest else None
        for number in moved:
            self._discard(number)
        return moved

    def _discard(self, number: int) -> None:
        del self._id_of[self._masks[number]]
        self._uses[number] = 0
        self._free.append(number)


class _LowerCounts:
    """Counts blocks of lower tiers, for runs of blocks that the same replicas hold alike."""

    def __init__(self) -> None:
        self._counts: dict[int, list[int]] = {}
        self._last, self._times = (0, 0), 0

    def add(self, mask: int, held: int) -> None:
        """One more block; held: the replicas that count."""
        if (mask, held) != self._last:
            self._flush()
            self._last = mask, held
        self._times += 1

    def _flush(self) -> None:
        mask, held = self._last
        for tier in (0, 1):
            below = mask >> (tier + 1) * PLANE & held
            while below:
                low = below & -below
                counts = self._counts.setdefault(low.bit_length() - 1, [0, 0])
                counts[tier] += self._times
                below ^= low
        self._times = 0

    def counts(self) -> dict[int, Lower]:
        """By replica."""
        self._flush()
        return {replica: Lower(*counts) for replica, counts in self._counts.items()}


@dataclass(slots=True)
class _Source:
    """What is known of a replica's sequence of updates."""

    epoch: int = -1
    next: int | None = None
    """Number of the change that must come next; None: only a listing helps."""


class GlobalPrefixIndex:
    """Prefix -> the replicas that hold it; exact, as far as their updates have come.

    A replica's updates are applied in order. When one is missing, or a replica starts anew, all
    that was known of it is forgotten until it has listed what it holds. Memory is bounded by the
    replicas' blocks: some 15 bytes for each different prefix, whoever holds it and in which
    tier. Prefixes are named by `prefix_key`.
    """

    def __init__(self) -> None:
        self._table = CompactTable()
        self._sets = HolderSets()
        self._sources: dict[int, _Source] = {}

    def __len__(self) -> int:
        """Different prefixes."""
        return len(self._table)

    def apply(self, replica: int, update: PrefixUpdate) -> bool:
        """Take in a replica's update. False: something is missing, ask the replica to list.

        Updates of an epoch that is over are ignored.
        """
        source = self._sources.setdefault(replica, _Source())
        if update.epoch < source.epoch:
            return True
        if update.listing:
            self._forget(replica)
            for key, tier in zip(update.keys, update.added or repeat(Tier.DEVICE), strict=False):
                self._insert(replica, key, tier)
        elif update.epoch != source.epoch or update.first != source.next:
            if source.next is not None:
                self._forget(replica)
            source.epoch, source.next = update.epoch, None
            return False
        else:
            for key, tier in zip(update.keys, update.added, strict=True):
                if tier:
                    self._insert(replica, key, tier)
                else:
                    self._remove(replica, key)
        source.epoch, source.next = update.epoch, update.next
        return True

    def drop(self, replica: int) -> None:
        """The replica is gone, and its epoch over. O(prefixes)."""
        source = self._sources.setdefault(replica, _Source())
        source.epoch, source.next = source.epoch + 1, None
        self._forget(replica)

    def runs(self, keys: Iterable[int]) -> list[tuple[int, int]]:
        """`lookup`, whatever tier the blocks are in."""
        return self.lookup(keys)[0]

    def lookup(self, keys: Iterable[int]) -> tuple[list[tuple[int, int]], dict[int, Lower]]:
        """How many of these consecutive blocks, from the first on, the replicas hold.

        Answers (blocks, the replicas that hold just so many, as a bit mask), the least first; who
        holds none is not listed. Beside it, of each replica that has not all of them in its pool,
        how many are below. Asks for no further key once no replica holds the last one.
        """
        found: list[tuple[int, int]] = []
        lower = _LowerCounts()
        left, depth, last, mask = _ALL, 0, -1, 0
        for number in self._table.walk(keys):
            if number != last:
                mask, last = self._sets.mask(number), number
                held = left & mask
                if held != left:
                    if depth:
                        found.append((depth, left & ~held))
                    left = held
                    if not left:
                        break
            depth += 1
            if mask > _ALL:
                lower.add(mask, left)
        if left and depth:
            found.append((depth, left))
        return found, lower.counts()

    def tier(self, replica: int, key: int) -> Tier:
        """Where a replica holds a block, for audits."""
        number = self._table.get(key)
        mask = (0 if number is None else self._sets.mask(number)) >> replica
        if not mask & 1:
            return Tier.NONE
        return (
            Tier.HOST if mask >> PLANE & 1 else Tier.DISK if mask >> 2 * PLANE & 1 else Tier.DEVICE
        )

    def contents(self, replica: int) -> frozenset[int]:
        """All that the replica holds, for audits. O(prefixes)."""
        return frozenset(
            key for key, number in self._table.items() if self._sets.mask(number) >> replica & 1
        )

    def _insert(self, replica: int, key: int, tier: int) -> None:
        number = self._table.get(key)
        before = 0 if number is None else self._sets.mask(number)
        after = before & ~_bits(replica) | 1 << replica
        if tier != Tier.DEVICE:
            after |= 1 << (tier - 1) * PLANE + replica
        if after != before:
            self._table.set(key, self._sets.use(after))
            if number is not None:
                self._sets.leave(number)

    def _remove(self, replica: int, key: int) -> None:
        number = self._table.get(key)
        if number is None:
            return  # it shared its name with one that has gone before
        after = self._sets.mask(number) & ~_bits(replica)
        if after == self._sets.mask(number):
            return
        if after:
            self._table.set(key, self._sets.use(after))
        else:
            self._table.remove(key)
        self._sets.leave(number)

    def _forget(self, replica: int) -> None:
        if moved := self._sets.without(replica):
            self._table.replace_values(moved)
