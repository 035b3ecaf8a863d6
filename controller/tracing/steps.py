"""Which steps the ranks tell of: those of requests that are traced."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from phalanx.controller.scheduling.sample import Sample
from phalanx.protos.steps import MAX_TRACES, StepPlan

from .context import RequestTrace


def trace_step(plan: StepPlan, samples: Iterable[Sample]) -> StepPlan:
    """The plan with the spans that the ranks' spans are to lie under; `samples` compute in it."""
    parents: dict[str, None] = {}
    for sample in samples:
        trace: RequestTrace | None = sample.request.trace
        if trace is not None and (parent := _parent(trace, sample)):
            parents[parent] = None
    if not parents:
        return plan
    return msgspec.structs.replace(plan, traces=list(parents)[:MAX_TRACES])


def _parent(trace: RequestTrace, sample: Sample) -> str:
    return trace.stepped(decoding=sample.num_computed > sample.num_prompt)
