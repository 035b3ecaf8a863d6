"""A table from 8-byte names to 4-byte values in about 14 bytes an entry."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

FILL = 256
"""Entries of a bucket on average, at most."""
STRIDE = 32
"""Names of a stretch, at most."""


class CompactTable:
    """uint64 -> uint32 without an object for each entry. Names must be spread evenly.

    Linear hashing (Litwin 1980) over sorted arrays: whenever the buckets hold more than `FILL`
    entries on average, one of them, the next in turn, is split in two. There is no moment when
    everything is moved, and a call costs a binary search and a short move of memory. The number of
    buckets does not fall again; an empty one takes some 200 bytes.
    """

    def __init__(self) -> None:
        self._keys = [array("Q")]
        self._values = [array("I")]
        self._mask = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, key: int) -> int | None:
        """The value, None if there is none."""
        bucket = self._bucket(key)
        keys = self._keys[bucket]
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            return self._values[bucket][place]
        return None

    def walk(self, keys: Iterable[int], changed: Callable[[int, int], bool]) -> int:
        """Go through these names up to the first that has no value; how many have one.

        changed: called with a value and the names before it whenever that is not the value of the
        name before it; False ends the walk there. Names come in stretches of 1, 2, 4, ... `STRIDE`,
        and it is taken that a value which was left does not come again: a stretch whose last name
        still has the value before has it throughout, and the place where it is left is found by
        halving. The table must not change meanwhile.
        """
        if isinstance(keys, Sequence):
            return self._walk(keys, lambda stop: min(stop, len(keys)), changed)
        coming, known = iter(keys), list[int]()

        def fetch(stop: int) -> int:
            known.extend(islice(coming, stop - len(known)))
            return len(known)

        return self._walk(known, fetch, changed)

    def _walk(
        self, keys: Sequence[int], fetch: Callable[[int], int], changed: Callable[[int, int], bool]
    ) -> int:
        """fetch: sees to it that there are so many keys, if possible, and says how many."""
        get, last, depth, length = self.get, -1, 0, 1
        while depth < (stop := fetch(depth + length)):
            length = min(2 * length, STRIDE)
            end = get(keys[stop - 1])
            while depth < stop:
                if end == last:
                    depth = stop
                    break
                if last >= 0:
                    low, high = depth, stop - 1
                    while low < high:
                        middle = (low + high) // 2
                        if get(keys[middle]) == last:
                            low = middle + 1
                        else:
                            high = middle
                    depth = low
                value = get(keys[depth])
                if value is None or not changed(value, depth):
                    return depth
                last = value
        return depth

    def change(
        self, keys: Iterable[int], marks: Iterable[int], after: Callable[[int, int], int]
    ) -> None:
        """Give each name, one after the other, the value ``after(its value, its mark)``; -1 stands
        for no entry."""
        for key, mark in zip(keys, marks, strict=True):
            bucket = key & self._mask
            if bucket >= len(self._keys):
                bucket &= self._mask >> 1
            names, values = self._keys[bucket], self._values[bucket]
            place = bisect_left(names, key)
            if place == len(names) or names[place] != key:
                if (new := after(-1, mark)) >= 0:
                    names.insert(place, key)
                    values.insert(place, new)
                    self._count += 1
                    if self._count > len(self._keys) * FILL:
                        self._split()
            elif (new := after(values[place], mark)) >= 0:
                values[place] = new
            else:
                del names[place], values[place]
                self._count -= 1

    def replace_values(self, new: Mapping[int, int | None]) -> None:
        """Change these values everywhere; entries whose new value is None leave. O(entries)."""
        for bucket, values in enumerate(self._values):
            if new.keys().isdisjoint(values):
                continue
            keys = self._keys[bucket]
            kept = [
                (key, now)
                for key, value in zip(keys, values, strict=True)
                if (now := new.get(value, value)) is not None
            ]
            self._count -= len(keys) - len(kept)
            self._keys[bucket] = array("Q", [key for key, _ in kept])
            self._values[bucket] = array("I", [value for _, value in kept])

    def items(self) -> Iterator[tuple[int, int]]:
        """All entries, for audits."""
        for keys, values in zip(self._keys, self._values, strict=True):
            yield from zip(keys, values, strict=True)

    def _bucket(self, key: int) -> int:
        bucket = key & self._mask
        # not split yet: its entries are still where one bit less leads
        return bucket if bucket < len(self._keys) else bucket & self._mask >> 1

    def _split(self) -> None:
        new = len(self._keys)
        if new > self._mask:
            self._mask = 2 * self._mask + 1
        old = new & self._mask >> 1
        pairs = list(zip(self._keys[old], self._values[old], strict=True))
        halves = [[pair for pair in pairs if pair[0] & self._mask == goal] for goal in (old, new)]
        self._keys[old], keys = (array("Q", [key for key, _ in half]) for half in halves)
        self._values[old], values = (array("I", [value for _, value in half]) for half in halves)
        self._keys.append(keys)
        self._values.append(values)
