"""Waiting order and deadlines, both cheap however much is queued."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from phalanx.controller.tenants import Tenants

from .fairness import FairShare
from .request import Request
from .sample import Sample

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""Service that a token counts for: an output token costs a step's row, a prompt token less."""

Key = tuple[str, int]


def due(request: Request, aging_s: float) -> float:
    """By when a request ought to have its turn; within a tenant, the earliest one comes first.

    That is `aging_s` after its arrival, for each step of priority `aging_s` later, and not after
    its deadline. As it does not change, whoever arrives later passes a request only if it is so
    much more urgent, and only for so long: nobody starves (earliest deadline first, Liu and
    Layland 1973).
    """
    usual = request.arrival + aging_s * (1 + request.priority)
    return usual if request.deadline is None else min(usual, request.deadline)


class _Line:
    """A tenant's waiting samples, the earliest due first, ties as they came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self.samples: dict[int, Sample] = {}
        """By ticket."""

    def push(self, due: float, sample: Sample) -> None:
        self.samples[sample.ticket] = sample
        heapq.heappush(self._heap, (due, sample.ticket))

    @property
    def first(self) -> Sample:
        """Precondition: somebody waits."""
        while self._heap[0][1] not in self.samples:
            heapq.heappop(self._heap)
        return self.samples[self._heap[0][1]]

    def remove(self, ticket: int) -> None:
        del self.samples[ticket]
        if len(self._heap) > 2 * len(self.samples) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self.samples]
            heapq.heapify(self._heap)


class WaitingQueue:
    """Samples that wait for a place: returning ones, then each tenant's in turn::

        head  | preempted and forked samples | tenant a: the earliest due first | append
              ^ push_front                   | tenant b: the earliest due first | append

    Among tenants, the turn is with the one that has had the least (`FairShare`): a priority is
    worth something within a tenant only, or everybody would be in a hurry. Whoever's turn it
    was keeps it until a request of that tenant leaves the queue, so that a large one at the head
    is not overtaken by other tenants while room is made for it; only returning samples go before.
    A sample is known by its ticket, so that it can leave from anywhere, or hand on its place.
    Every call is O(log samples), amortised.

    Until the first sample of a tenant's line has its turn, at most `max_bypass` + T - 1 samples
    of other tenants leave from the heads of their lines, T being the tenants that wait.
    """

    def __init__(
        self, tenants: Tenants | None = None, max_bypass: int = 1024, aging_s: float = 10.0
    ) -> None:
        limits = tenants or Tenants()
        self._aging_s = aging_s
        self._front: OrderedDict[int, Sample] = OrderedDict()
        self._lines: dict[str, _Line] = {}
        self._share = FairShare(lambda tenant: limits.of(tenant).weight, max_bypass)
        self._turn: str | None = None
        """The tenant whose turn it is, once somebody has asked."""
        self._apart: dict[int, Sample] = {}
        """Samples on probation, which are nobody's head."""
        self._length = 0
        self._next_ticket = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        lines = (line.samples.values() for line in self._lines.values())
        return chain(self._apart.values(), self._front.values(), *lines)

    @property
    def num_apart(self) -> int:
        """Samples on probation: they wait for a step of their own."""
        return len(self._apart)

    @property
    def has_head(self) -> bool:
        """Whether anybody else waits."""
        return self._length > len(self._apart)

    @property
    def head(self) -> Sample:
        """Whose turn it is. Precondition: `has_head`."""
        if self._front:
            return next(iter(self._front.values()))
        if self._turn is None:
            self._turn = self._share.next()
        return self._lines[self._turn].first

    @property
    def has_returned(self) -> bool:
        """Whether the head is a preempted or forked sample."""
        return bool(self._front)

    def first_of(self, allowed: Callable[[str], bool]) -> Sample | None:
        """The head of the line of the tenant that has had the least, of the allowed ones. The turn
        stays where it is. O(tenants)."""
        tenants = filter(allowed, self._lines)
        best = min(tenants, key=self._share.counter, default=None)
        return None if best is None else self._lines[best].first

    def append(self, sample: Sample) -> None:
        """Add to its tenant's line."""
        if sample.probation:
            self._set_apart(sample)
            return
        tenant = sample.request.tenant
        if tenant not in self._lines:
            self._lines[tenant] = _Line()
            self._share.join(tenant)
        self._ticket(sample)
        self._lines[tenant].push(due(sample.request, self._aging_s), sample)
        self._length += 1

    def push_front(self, sample: Sample) -> None:
        """Add to the head."""
        if sample.probation:
            self._set_apart(sample)
            return
        ticket = self._ticket(sample)
        self._front[ticket] = sample
        self._front.move_to_end(ticket, last=False)
        self._length += 1

    def remove(self, sample: Sample) -> None:
        """Take a sample out, wherever it stands."""
        self._length -= 1
        for where in (self._front, self._apart):
            if where.pop(sample.ticket, None) is not None:
                return
        tenant = sample.request.tenant
        line = self._lines[tenant]
        if line.first.ticket == sample.ticket:
            self._share.restart(tenant)
            if self._turn == tenant:
                self._turn = None
        line.remove(sample.ticket)
        if not line.samples:
            del self._lines[tenant]
            self._share.leave(tenant)

    def replace(self, sample: Sample, heir: Sample) -> None:
        """Give a sample's place to another one of the same request."""
        heir.ticket = sample.ticket
        if heir.ticket in self._front:
            self._front[heir.ticket] = heir
        elif heir.ticket in self._apart:
            self._apart[heir.ticket] = heir
        else:
            self._lines[heir.request.tenant].samples[heir.ticket] = heir

    def charge_input(self, tenant: str, tokens: int) -> None:
        """A request of the tenant was admitted."""
        self._share.charge(tenant, INPUT_WEIGHT * tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        """The tenant got tokens."""
        self._share.charge(tenant, OUTPUT_WEIGHT * tokens)

    def _set_apart(self, sample: Sample) -> None:
        self._apart[self._ticket(sample)] = sample
        self._length += 1

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
