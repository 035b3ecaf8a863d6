"""Waiting order and deadlines, both cheap however much is queued."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from .fairness import FairShare
from .sample import Sample

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""Service that a token counts for: an output token costs a step's row, a prompt token less."""

Key = tuple[str, int]


class WaitingQueue:
    """Samples that wait for a place: returning ones, then each tenant's in turn::

        head  | preempted and forked samples | tenant a: first come, first served | append
              ^ push_front                   | tenant b: first come, first served | append

    Among tenants, the turn is with the one that has had the least (`FairShare`). Whoever's turn it
    was keeps it until he leaves the queue, so that a large request at the head is not overtaken
    while room is made for it; only returning samples go before. A sample is known by its ticket,
    so that it can leave from anywhere, or hand on its place. Every call is O(log tenants).

    Until the first sample of a tenant's line has its turn, at most `max_bypass` + T - 1 samples
    of other tenants leave from the heads of their lines, T being the tenants that wait.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, max_bypass: int = 1024) -> None:
        self._front: OrderedDict[int, Sample] = OrderedDict()
        self._lines: dict[str, OrderedDict[int, Sample]] = {}
        self._share = FairShare(weights or {}, max_bypass)
        self._turn: str | None = None
        """The tenant whose turn it is, once somebody has asked."""
        self._length = 0
        self._next_ticket = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        return chain(self._front.values(), *(line.values() for line in self._lines.values()))

    @property
    def head(self) -> Sample:
        """Whose turn it is. Precondition: the queue is not empty."""
        if self._front:
            return next(iter(self._front.values()))
        if self._turn is None:
            self._turn = self._share.next()
        return next(iter(self._lines[self._turn].values()))

    def append(self, sample: Sample) -> None:
        """Add to the tail of its tenant's line."""
        tenant = sample.request.tenant
        if tenant not in self._lines:
            self._lines[tenant] = OrderedDict()
            self._share.join(tenant)
        self._lines[tenant][self._ticket(sample)] = sample
        self._length += 1

    def push_front(self, sample: Sample) -> None:
        """Add to the head."""
        ticket = self._ticket(sample)
        self._front[ticket] = sample
        self._front.move_to_end(ticket, last=False)
        self._length += 1

    def remove(self, sample: Sample) -> None:
        """Take a sample out, wherever it stands."""
        self._length -= 1
        if self._front.pop(sample.ticket, None) is not None:
            return
        tenant = sample.request.tenant
        line = self._lines[tenant]
        if next(iter(line)) == sample.ticket:
            self._share.restart(tenant)
            if self._turn == tenant:
                self._turn = None
        del line[sample.ticket]
        if not line:
            del self._lines[tenant]
            self._share.leave(tenant)

    def replace(self, sample: Sample, heir: Sample) -> None:
        """Give a sample's place to another one of the same request."""
        heir.ticket = sample.ticket
        front = heir.ticket in self._front
        (self._front if front else self._lines[heir.request.tenant])[heir.ticket] = heir

    def charge_input(self, tenant: str, tokens: int) -> None:
        """A request of the tenant was admitted."""
        self._share.charge(tenant, INPUT_WEIGHT * tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        """The tenant got tokens."""
        self._share.charge(tenant, OUTPUT_WEIGHT * tokens)

    def _ticket(self, sample: Sample) -> int:
        sample.ticket = self._next_ticket
        self._next_ticket += 1
        return sample.ticket


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
