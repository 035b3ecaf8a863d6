"""Which replica holds which prefix: one view of all replicas' prefix indexes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

    def number(self, mask: int) -> int:
        """The number of a set, which is used soon."""
        return self.use(mask, 0)

    def use_again(self, number: int) -> None:
        """The set is used once more."""
        self._uses[number] += 1

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

    def leave(self, number: int) -> bool:
        """The set is used once less; whether that was the last time."""
        self._uses[number] -= 1
        if not self._uses[number]:
            self._discard(number)
            return True
        return False

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


class _Change:
    """The sets of blocks that one replica gets or loses, one after the other."""

    def __init__(self, sets: HolderSets, replica: int) -> None:
        self._sets = sets
        self._others = ~_bits(replica)
        own = 1 << replica
        self._own = (0, own, own | own << PLANE, own | own << 2 * PLANE)
        self._known: dict[int, int] = {}
        """What has become of sets so far, while each of them has kept its number."""

    def after(self, before: int, tier: int) -> int:
        """The number of a block's set once the replica holds it in a tier; -1: nobody holds it."""
        after = self._known.get(4 * before + tier)
        if after is None:
            mask = 0 if before < 0 else self._sets.mask(before)
            mask = mask & self._others | self._own[tier]
            after = self._known[4 * before + tier] = self._sets.number(mask) if mask else -1
        if after != before:
            if after >= 0:
                self._sets.use_again(after)
            if before >= 0 and self._sets.leave(before):
                self._known.clear()
        return after


class _Walk:
    """What replicas hold of consecutive blocks, told run by run of blocks that are held alike."""

    def __init__(self, sets: HolderSets) -> None:
        self._sets = sets
        self._left, self._mask, self._depth = _ALL, 0, 0
        self.found: list[tuple[int, int]] = []
        self._lower: dict[int, list[int]] = {}

    def changed(self, number: int, depth: int) -> bool:
        """From this depth on, blocks are held by another set; False: by none that holds all."""
        mask, left = self._sets.mask(number), self._left
        if self._mask > _ALL:
            self._count_lower(depth)
        self._mask, self._depth = mask, depth
        held = left & mask
        if held != left:
            if depth:
                self.found.append((depth, left & ~held))
            self._left = held
        return held != 0

    def end(self, depth: int) -> dict[int, Lower]:
        """There are no more blocks; of the replicas, what is below their pools."""
        if self._mask > _ALL:
            self._count_lower(depth)
        if self._left and depth:
            self.found.append((depth, self._left))
        return {replica: Lower(*counts) for replica, counts in self._lower.items()}

    def _count_lower(self, depth: int) -> None:
        for tier in (0, 1):
            below = self._mask >> (tier + 1) * PLANE & self._left
            while below:
                low = below & -below
                counts = self._lower.setdefault(low.bit_length() - 1, [0, 0])
                counts[tier] += depth - self._depth
                below ^= low


@dataclass(slots=True)
class _Source:
    """What is known of a replica's sequence of updates."""

    epoch: int = -1
    next: int | None = None
    """Number of the change that must come next; None: only a listing helps."""


class GlobalPrefixIndex:
    """Prefix -> the replicas that hold it; exact, as far as their updates have come.

    Lookups take it that who holds a block holds those before it, and look at few of many
    (`CompactTable.walk`); where a cache has a hole, they say more than there is.

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
            self._change(
                replica, update.keys, update.added or bytes([Tier.DEVICE]) * len(update.keys)
            )
        elif update.epoch != source.epoch or update.first != source.next:
            if source.next is not None:
                self._forget(replica)
            source.epoch, source.next = update.epoch, None
            return False
        else:
            self._change(replica, update.keys, update.added)
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
        walk = _Walk(self._sets)
        depth = self._table.walk(keys, walk.changed)
        return walk.found, walk.end(depth)

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

    def _change(self, replica: int, keys: Sequence[int], tiers: Sequence[int]) -> None:
        """A replica holds these blocks in these tiers now."""
        self._table.change(keys, tiers, _Change(self._sets, replica).after)

    def _forget(self, replica: int) -> None:
        if moved := self._sets.without(replica):
            self._table.replace_values(moved)
