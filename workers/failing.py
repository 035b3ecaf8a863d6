"""A rank's engine with failpoints in it; `group.py` takes it where tests ask for it."""

from __future__ import annotations

import os

from phalanx.protos.failpoints import Failpoints
from phalanx.protos.specs import LoadReport
from phalanx.protos.steps import StepPlan

from .engine import Engine
from .pending import PendingStep


class FailingEngine(Engine):
    """Fails before a step, and at a token of a new sequence's prompt; says which process it is, and
    which steps it has executed."""

    points: Failpoints
    name: str
    """EPOCH-RANK"""

    def load(self, *arguments: object) -> LoadReport:
        """See `Engine.load`."""
        self.points.note(f"rank-{self.name}", str(os.getpid()))
        return super().load(*arguments)  # type: ignore[arg-type]

    def launch(self, plan: StepPlan) -> PendingStep:
        """See `Engine.launch`."""
        self.points.hit("step")
        poison = self.points.armed("poison")
        prompts = (new.token_ids[: new.num_prompt] for new in plan.new)
        if poison is not None and any(poison.token in prompt for prompt in prompts):
            self.points.hit("poison")
        step = super().launch(plan)
        self.points.count(f"steps-{self.name}", plan.step)
        return step
