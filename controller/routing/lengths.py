"""How long answers usually are, learned from those that have ended."""

from __future__ import annotations

from collections import OrderedDict

USUAL = 256.0
"""Tokens of an answer of a tenant of whom nothing is known."""
KEEP = 0.95
"""What a further answer leaves of the weight of those before it."""
MAX_TENANTS = 4096


class OutputLengths:
    """The mean length of each tenant's answers, the latest ones counting most."""

    def __init__(self) -> None:
        self._means: OrderedDict[str, float] = OrderedDict()

    def saw(self, tenant: str, tokens: int) -> None:
        """A sample has ended by itself or at its limit."""
        mean = self._means.pop(tenant, None)
        self._means[tenant] = tokens if mean is None else KEEP * mean + (1.0 - KEEP) * tokens
        if len(self._means) > MAX_TENANTS:
            self._means.popitem(last=False)

    def usual(self, tenant: str) -> float:
        """Tokens that a sample of this tenant can be expected to have."""
        return self._means.get(tenant, USUAL)


def expected_left(usual: float, so_far: int, allowed: int | None) -> int:
    """Tokens that a sample is expected to generate yet, at least 1.

    One that has outlived what is usual is taken to go on for a quarter of that. allowed: its limit.
    """
    left = max(usual - so_far, usual / 4)
    return max(round(left if allowed is None else min(left, allowed - so_far)), 1)
