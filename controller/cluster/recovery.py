"""What to do next about replicas that are not there: a pure function of facts and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 30.0
MEMORY_S = 300.0
"""Failures longer ago than this are forgiven."""
CRASH_LOOP = 5
"""So many failures within `MEMORY_S` make a replica degraded; it is still tried, seldom."""
DEGRADED_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of one replica, by its history. Times are of one monotonic clock."""

    running: bool = False
    failures: tuple[float, ...] = ()
    """When its group was lost or did not start, in order."""
    cause: str = ""
    """Of the last failure."""

    def failed(self, now: float, cause: str) -> Slot:
        """The slot after its group was lost, or did not start."""
        recent = tuple(time for time in self.failures if time > now - MEMORY_S)
        return replace(self, running=False, failures=(*recent, now), cause=cause)

    def started(self) -> Slot:
        """The slot with a group that has proven itself."""
        return replace(self, running=True)

    def recent_failures(self, now: float) -> int:
        """Failures that still count."""
        return sum(time > now - MEMORY_S for time in self.failures)

    def degraded(self, now: float) -> bool:
        """Whether starting it again and again has not helped."""
        return not self.running and self.recent_failures(now) >= CRASH_LOOP

    def due(self, now: float) -> float:
        """When it may be started."""
        if not self.failures:
            return now
        if self.degraded(now):
            return self.failures[-1] + DEGRADED_BACKOFF_S
        # the first failure after a quiet time is answered at once
        exponent = self.recent_failures(now) - 2
        wait = 0.0 if exponent < 0 else min(FIRST_BACKOFF_S * 2.0**exponent, LONGEST_BACKOFF_S)
        return self.failures[-1] + wait


@dataclass(frozen=True, slots=True)
class Start:
    """Start a group for this slot now."""

    index: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing may be done for so many seconds, unless a replica is lost meanwhile; None: for ever."""

    seconds: float | None


def next_action(slots: Sequence[Slot], now: float) -> Start | Wait:
    """The slot that is due first, ties to the lowest index; else how long to wait.

    One group starts at a time: starting ones compete for the memory that sizing has looked at.
    """
    missing = [(slot.due(now), index) for index, slot in enumerate(slots) if not slot.running]
    if not missing:
        return Wait(None)
    due, index = min(missing)
    return Start(index) if due <= now else Wait(due - now)
