"""Places and budget for tenants that have less than their share, so that they need not wait."""

from __future__ import annotations

from collections import Counter, OrderedDict

from phalanx.controller.tenants import CANARY_TENANT, Tenants

KEEP_S = 60.0
"""A tenant counts for so long after its last request."""
KEPT = 8
"""One of so many places is kept, and at least one."""
MAX_TENANTS = 4096


class Places:
    """Who of several tenants runs how much, and who may take the last places.

    Order alone (`fairness.FairShare`) gives a tenant the next place that becomes free, and that
    takes as long as the answers of others are. Therefore, while several tenants come, some places
    are left to those that have less than their share of all places, by weight.
    """

    def __init__(self, tenants: Tenants, max_running: int) -> None:
        self._tenants, self._max_running = tenants, max_running
        self.running: Counter[str] = Counter()
        """Samples that hold blocks, by tenant."""
        self._seen: OrderedDict[str, float] = OrderedDict()
        """When a request of each tenant came last, the longest ago first."""
        self._weights = 0.0

    @property
    def contended(self) -> bool:
        """Whether several tenants come."""
        return len(self._seen) > 1

    def saw(self, tenant: str, arrival: float) -> None:
        """A request of the tenant came; seconds of the monotonic clock."""
        if tenant == CANARY_TENANT:
            return
        known = self._seen.pop(tenant, None)
        if known is None:
            self._weights += self._tenants.of(tenant).weight
        self._seen[tenant] = arrival if known is None else max(known, arrival)

    def forget(self, now: float) -> None:
        """Who has not come for a while does not count."""
        while self._seen:
            tenant, seen = next(iter(self._seen.items()))
            if seen + KEEP_S > now and len(self._seen) <= MAX_TENANTS:
                return
            del self._seen[tenant]
            self._weights -= self._tenants.of(tenant).weight

    def ended(self, tenant: str) -> None:
        """A sample of the tenant holds no blocks any more."""
        self.running[tenant] -= 1
        if not self.running[tenant]:
            del self.running[tenant]

    def below_share(self, tenant: str) -> bool:
        """Whether it runs less than its part of all places."""
        weight = self._tenants.of(tenant).weight
        return self.running[tenant] * self._weights < self._max_running * weight

    def may_take(self, tenant: str, free: int) -> bool:
        """Whether one of `free` places is for this tenant."""
        kept = max(self._max_running // KEPT, 1) if self.contended and self._max_running > 1 else 0
        return free > kept or self.below_share(tenant)
