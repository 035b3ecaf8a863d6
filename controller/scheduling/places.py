"""Places and budget for tenants that have less than their share, so that they need not wait."""

from __future__ import annotations

from collections import Counter, OrderedDict

from phalanx.controller.tenants import CANARY_TENANT, Tenants

SMOOTHING = 0.2
RICH = 1.5
KEEP_S = 60.0
"""A tenant counts for so long after its last request."""
FAVOURED = 0.75
"""Of the budget that streams leave: for prompts of tenants below their share."""
OTHERS = 0.5
"""Of a step's budget: for prompts of all others, so that whoever comes waits for a short step."""
HURRY = 0.5
"""Where somebody runs more than its share: no more than this part of the others' usual prompt."""
LEAST = 0.125
"""Of a step's budget, and in any case: below that steps cost more than they compute."""
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
        self._weights, self._num_running = 0.0, 0
        self.usual_prompt = 0.0
        """Tokens of a prompt of those who were below their share when it came, lately."""

    @property
    def contended(self) -> bool:
        """Whether several tenants come."""
        return len(self._seen) > 1

    @property
    def lopsided(self) -> bool:
        """Whether somebody runs much more than its part of all that run, and others less."""
        return self.contended and any(map(self.is_rich, self.running))

    def load(self, tenant: str) -> float:
        """What it runs, by its weight."""
        return self.running[tenant] / self._tenants.of(tenant).weight

    def saw(self, tenant: str, arrival: float, prompt: int) -> None:
        """A request of the tenant came; seconds of the monotonic clock, and tokens."""
        if tenant == CANARY_TENANT:
            return
        if self.below_share(tenant):
            self.usual_prompt += SMOOTHING * (prompt - self.usual_prompt)
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

    def began(self, tenant: str) -> None:
        """A sample of the tenant holds blocks."""
        self.running[tenant] += 1
        self._num_running += 1

    def ended(self, tenant: str) -> None:
        """A sample of the tenant holds no blocks any more."""
        self.running[tenant] -= 1
        self._num_running -= 1
        if not self.running[tenant]:
            del self.running[tenant]

    def below_share(self, tenant: str) -> bool:
        """Whether it runs less than its part of all places."""
        return self._part_of(tenant, self._max_running) < 1

    def favours(self, tenant: str) -> bool:
        """Whether its prompts come first: it is below its share, and runs no more than others."""
        return self.below_share(tenant) and self._part_of(tenant, self._num_running) <= 1

    def is_rich(self, tenant: str) -> bool:
        """Whether it runs much more than its part of all that run."""
        return self._part_of(tenant, self._num_running) > RICH

    def _part_of(self, tenant: str, places: int) -> float:
        return self.load(tenant) * self._weights / max(places, 1)

    def for_others(self, most: int, used: int) -> int:
        """Tokens of a step of `most` for prompts of those who are not below their share, where
        those who are have used some."""
        others = OTHERS * most
        if self.lopsided:
            # whoever comes waits for a step of others: it is to be short against its own
            others = min(others, max(HURRY * self.usual_prompt, LEAST * most) - used)
        return max(int(others), int(LEAST * most) // 2, 1)

    def may_take(self, tenant: str, free: int) -> bool:
        """Whether one of `free` places is for this tenant."""
        kept = max(self._max_running // KEPT, 1) if self.contended and self._max_running > 1 else 0
        return free > kept or self.below_share(tenant)
