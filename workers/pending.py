"""A step that was queued on the device; its result can be had when it is done."""

from __future__ import annotations

from collections.abc import Callable

from phalanx.protos.steps import StepResult


class PendingStep:
    """The host may queue the next step before it asks for this one's result."""

    def __init__(
        self, finish: Callable[[], StepResult], arrived: Callable[[], bool] = lambda: True
    ) -> None:
        """finish: called once; may wait for the device. arrived: whether it would not."""
        self._finish, self._arrived = finish, arrived
        self._result: StepResult | None = None

    @classmethod
    def done(cls, result: StepResult) -> PendingStep:
        """A step that the host has waited for already."""
        step = cls(lambda: result)
        step.result()
        return step

    @property
    def is_done(self) -> bool:
        """Whether `result` would not wait."""
        return self._result is not None or self._arrived()

    def result(self) -> StepResult:
        """The step's result; waits for the device where it must."""
        if self._result is None:
            self._result = self._finish()
        return self._result
