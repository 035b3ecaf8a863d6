"""What the step loop tells whoever counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Where a step's time went, in seconds, and its size."""

    schedule_s: float
    execute_s: float
    update_s: float
    overhead_s: float
    """Time between this result and the one before it that no rank spent computing; zero for
    the first step after a pause."""
    rows: int
    tokens: int
    new_tokens: int = 0
    """Tokens that streams got by it."""


class Observer(Protocol):
    """Told about every step. Called on the step loop's thread; must be quick."""

    def on_step(self, times: StepTimes) -> None:
        """A step was executed."""

    def on_queue_time(self, seconds: float) -> None:
        """A request waited this long for its first step."""


class Silent:
    """An observer of nothing."""

    def on_step(self, times: StepTimes) -> None:
        """Nothing."""

    def on_queue_time(self, seconds: float) -> None:
        """Nothing."""
