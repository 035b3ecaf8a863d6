"""Waiting order and deadlines, both cheap however much is queued."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from .sample import Sample

Key = tuple[str, int]


class WaitingQueue:
    """Samples that wait for a place, first come, first served. Every call is O(1).

    ::

        head  | preempted and forked samples | never admitted samples, by arrival |  tail
              ^ push_front                                                 append ^

    A sample is known by its ticket, so that it can leave from anywhere, or hand on its place.
    """

    def __init__(self) -> None:
        self._samples: OrderedDict[int, Sample] = OrderedDict()
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples.values())

    @property
    def head(self) -> Sample:
        """Whose turn it is. Precondition: the queue is not empty."""
        return next(iter(self._samples.values()))

    def append(self, sample: Sample) -> None:
        """Add to the tail."""
        sample.ticket = self._next_ticket
        self._next_ticket += 1
        self._samples[sample.ticket] = sample

    def push_front(self, sample: Sample) -> None:
        """Add to the head."""
        self.append(sample)
        self._samples.move_to_end(sample.ticket, last=False)

    def remove(self, sample: Sample) -> None:
        """Take a sample out, wherever it stands."""
        del self._samples[sample.ticket]

    def replace(self, sample: Sample, heir: Sample) -> None:
        """Give a sample's place to another one."""
        heir.ticket = sample.ticket
        self._samples[heir.ticket] = heir


class DeadlineHeap:
    """Which deadlines have passed. Adding and taking out cost O(log n).

    Nobody tells the heap when a sample ends: its entry is found out when it comes due, or swept
    away once such entries are in the majority.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, Key]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, deadline: float, key: Key) -> None:
        """Remember a deadline (seconds of the monotonic clock)."""
        heapq.heappush(self._heap, (deadline, key))

    def pop_due(self, now: float) -> list[Key]:
        """Forget and return all whose deadline is not after `now`, the earliest first."""
        due: list[Key] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[1])
        return due

    def sweep(self, live: Iterable[tuple[float, Key]]) -> None:
        """Keep only the entries of live samples."""
        self._heap = list(live)
        heapq.heapify(self._heap)
