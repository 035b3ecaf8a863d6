"""Whether there is room for a request, told before anything is done for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from phalanx.protos.errors import ResourceExhausted

MEMORY_S = 10.0
"""Over so long the rate at which samples end is learned, and promises are remembered."""
MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0
UNKNOWN_RETRY_S = 2.0
"""While nothing of the tenant has ended yet."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(slots=True)
class _Account:
    """What one tenant has open. Times are of one monotonic clock."""

    since: float
    open: int = 0
    """Samples that were taken and have not ended."""
    served: float = 0.0
    """Samples that have ended, each forgotten by e in `MEMORY_S`."""
    served_at: float = 0.0
    promised: float = 0.0
    """Callers who were told when to come, forgotten alike: those who will have come, or gone."""
    promised_at: float = 0.0

    def rate(self, now: float) -> float:
        """Samples that end in a second; 0 where that is not known."""
        seen = 1.0 - math.exp(-(now - self.since) / MEMORY_S)
        return _left(self.served, now - self.served_at) / (MEMORY_S * seen) if seen else 0.0


class Door:
    """Counts what tenants have open, and refuses what would find a full queue.

    The scheduler decides; this is its rule by numbers that are at most a step old, for the price
    of a comparison. Belongs to one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._refusals = 0

    def enter(self, tenant: str, samples: int) -> None:
        """A request was taken."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(self._clock())
        account.open += samples

    def leave(self, tenant: str, samples: int, *, served: bool = True) -> None:
        """Samples have ended; served: they have had a place."""
        account = self._accounts.get(tenant)
        if account is None or not samples:
            return
        account.open -= samples
        if served:
            now = self._clock()
            account.served = _left(account.served, now - account.served_at) + samples
            account.served_at = now
        if not account.open:
            del self._accounts[tenant]

    def open(self, tenant: str) -> int:
        """Samples of the tenant that were taken and have not ended."""
        account = self._accounts.get(tenant)
        return 0 if account is None else account.open

    def check(self, tenant: str, running: int, most: int) -> None:
        """Raises `ResourceExhausted` where `most` samples of the tenant wait beside those that are
        running, with a time when there may be room."""
        account = self._accounts.get(tenant)
        if account is None or (waiting := account.open - running) < most:
            return
        raise ResourceExhausted(
            f"max_queued of tenant {tenant!r}: the queue is full, "
            f"{waiting} samples wait, {most} may",
            self._retry_s(account),
        )

    def _retry_s(self, account: _Account) -> float:
        """When this caller should come back: one after the other, as fast as places get free.

        Beyond `MAX_RETRY_S`, and where the rate is not known, callers are spread over a time's
        second half, evenly: the multiples of the golden ratio, Weyl 1916.
        """
        now = self._clock()
        account.promised = _left(account.promised, now - account.promised_at) + 1.0
        account.promised_at = now
        self._refusals += 1
        rate = account.rate(now)
        wait = account.promised / rate if rate else 0.0
        if 0.0 < wait <= MAX_RETRY_S:
            return max(wait, MIN_RETRY_S)
        most = MAX_RETRY_S if rate else UNKNOWN_RETRY_S
        return most * (0.5 + 0.5 * (self._refusals * GOLDEN % 1.0))


def _left(value: float, seconds: float) -> float:
    return value * math.exp(-seconds / MEMORY_S) if value else 0.0
