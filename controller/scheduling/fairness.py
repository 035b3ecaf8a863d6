"""Whose turn it is among tenants that wait: virtual token counters, and a bound on patience."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_IDLE = 4096
"""Tenants remembered while nothing of theirs waits."""


@dataclass(slots=True)
class _Account:
    counter: float = 0.0
    """Service received, divided by the tenant's weight."""
    waits: bool = False
    joined: int = 0
    """When it began to wait; decides ties."""
    queued: bool = False
    """Whether the heap has an entry for it."""


class FairShare:
    """Virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", 2024.

    The turn goes to the waiting tenant with the smallest counter, among equals to the one that
    has waited longest. Who begins to wait is lifted to the smallest counter of those that wait, or
    of the last one that did: nobody saves up for later. While two tenants wait, the service that
    they get, divided by their weights, differs by a bounded amount, whatever the sizes of their
    requests.

    Counters alone would let a procession of new tenants, each lifted to the smallest counter, pass
    a tenant with a greater one for ever. Therefore a tenant goes first once `max_bypass` turns of
    others have passed since its line's first request came to stand there; of several such ones,
    the one standing there longest. Then with T waiting tenants nobody is passed more than
    `max_bypass` + T - 1 times.

    Every call is O(log tenants), amortised: a heap entry whose counter has grown since is put
    right when it comes to the top, at most once for each charge.
    """

    def __init__(self, weight: Callable[[str], float], max_bypass: int) -> None:
        """weight: a tenant's share."""
        self._weight, self._max_bypass = weight, max_bypass
        self._accounts: dict[str, _Account] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._since: OrderedDict[str, int] = OrderedDict()
        """Waiting tenants -> turns when the first of the line came to stand there, oldest first."""
        self._turns = self._joins = 0
        self._last: str | None = None
        """The tenant that has left last."""

    def __len__(self) -> int:
        """Tenants remembered."""
        return len(self._accounts)

    def counter(self, tenant: str) -> float:
        """Service received, divided by the weight, lifts included."""
        account = self._accounts.get(tenant)
        return account.counter if account else 0.0

    def join(self, tenant: str) -> None:
        """A tenant begins to wait. Precondition: it does not wait yet."""
        lowest = self._lowest()
        floor = lowest[0] if lowest else self.counter(self._last) if self._last else 0.0
        account = self._accounts.setdefault(tenant, _Account())
        account.counter = max(account.counter, floor)
        self._joins += 1
        account.waits, account.joined = True, self._joins
        if not account.queued:
            account.queued = True
            heapq.heappush(self._heap, (account.counter, account.joined, tenant))
        self._since[tenant] = self._turns
        self._forget_idle(floor)

    def restart(self, tenant: str) -> None:
        """The first of the tenant's line has left it; the next one's patience begins."""
        self._turns += 1
        self._since[tenant] = self._turns
        self._since.move_to_end(tenant)

    def leave(self, tenant: str) -> None:
        """Nothing of the tenant's waits any more."""
        self._accounts[tenant].waits = False
        self._last = tenant
        del self._since[tenant]

    def charge(self, tenant: str, service: float) -> None:
        """The tenant received service, waiting or not."""
        account = self._accounts.setdefault(tenant, _Account())
        account.counter += service / self._weight(tenant)

    def next(self) -> str:
        """Whose turn it is. Precondition: somebody waits."""
        oldest, since = next(iter(self._since.items()))
        if self._turns - since >= self._max_bypass:
            return oldest
        lowest = self._lowest()
        return oldest if lowest is None else lowest[2]

    def _lowest(self) -> tuple[float, int, str] | None:
        """The right entry of the waiting tenant with the smallest counter."""
        heap = self._heap
        while heap:
            tenant = heap[0][2]
            account = self._accounts[tenant]
            entry = (account.counter, account.joined, tenant)
            if not account.waits:
                heapq.heappop(heap)
                account.queued = False
            elif heap[0] != entry:
                heapq.heapreplace(heap, entry)
            else:
                return entry
        return None

    def _forget_idle(self, floor: float) -> None:
        """Forget tenants whose counters say nothing more; if they are too many, the smallest."""
        if len(self._accounts) <= 2 * (len(self._since) + MAX_IDLE):
            return
        for account in self._accounts.values():
            account.queued = account.waits
        self._heap = [
            (account.counter, account.joined, tenant)
            for tenant, account in self._accounts.items()
            if account.waits
        ]
        heapq.heapify(self._heap)
        idle = [
            (account.counter, tenant)
            for tenant, account in self._accounts.items()
            if not account.waits and tenant != self._last
        ]
        idle.sort(reverse=True)
        for place, (counter, tenant) in enumerate(idle):
            if counter <= floor or place >= MAX_IDLE:
                del self._accounts[tenant]
