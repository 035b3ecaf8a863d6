"""Which replica holds which prefix: one view of all replicas' prefix indexes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phalanx.controller.kvcache.changes import PrefixUpdate

from .table import CompactTable


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
                rest = mask & ~bit
                moved[number] = self.use(rest, self._uses[number]) if rest else None
        for number in moved:
            self._discard(number)
        return moved

    def _discard(self, number: int) -> None:
        del self._id_of[self._masks[number]]
        self._uses[number] = 0
        self._free.append(number)


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
    replicas' blocks: some 15 bytes for each different prefix, whoever holds it. Prefixes are named
    by `prefix_key`.
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
            for key in update.keys:
                self._insert(replica, key)
        elif update.epoch != source.epoch or update.first != source.next:
            if source.next is not None:
                self._forget(replica)
            source.epoch, source.next = update.epoch, None
            return False
        else:
            for key, added in zip(update.keys, update.added, strict=True):
                (self._insert if added else self._remove)(replica, key)
        source.epoch, source.next = update.epoch, update.next
        return True

    def drop(self, replica: int) -> None:
        """The replica is gone, and its epoch over. O(prefixes)."""
        source = self._sources.setdefault(replica, _Source())
        source.epoch, source.next = source.epoch + 1, None
        self._forget(replica)

    def runs(self, keys: Iterable[int]) -> list[tuple[int, int]]:
        """How many of these consecutive blocks, from the first on, the replicas hold.

        Answers (blocks, the replicas that hold just so many, as a bit mask), the least first; who
        holds none is not listed. Asks for no further key once no replica holds the last one.
        """
        found: list[tuple[int, int]] = []
        left, depth, last = -1, 0, -1
        for number in self._table.walk(keys):
            if number != last:
                held, last = left & self._sets.mask(number), number
                if held != left:
                    if depth:
                        found.append((depth, left & ~held))
                    left = held
                    if not left:
                        break
            depth += 1
        if left and depth:
            found.append((depth, left))
        return found

    def contents(self, replica: int) -> frozenset[int]:
        """All that the replica holds, for audits. O(prefixes)."""
        return frozenset(
            key for key, number in self._table.items() if self._sets.mask(number) >> replica & 1
        )

    def _insert(self, replica: int, key: int) -> None:
        number = self._table.get(key)
        before = 0 if number is None else self._sets.mask(number)
        after = before | 1 << replica
        if after != before:
            self._table.set(key, self._sets.use(after))
            if number is not None:
                self._sets.leave(number)

    def _remove(self, replica: int, key: int) -> None:
        number = self._table.get(key)
        if number is None:
            return  # it shared its name with one that has gone before
        after = self._sets.mask(number) & ~(1 << replica)
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
