"""A rank's own account of the steps that plans ask it to tell of, for OpenTelemetry.

It times itself and decides nothing by it. Nothing of this is imported where plans never ask.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phalanx.protos.specs import WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult

from .pending import PendingStep

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

EXPORT_TIMEOUT_S = 5
LAST_WORDS_MS = 1000

Launch = Callable[[StepPlan], PendingStep]

_log = logging.getLogger(__name__)


class StepSpans:
    """Makes spans of steps and hands them to `processor`."""

    def __init__(self, processor: SpanProcessor, rank: int) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "phalanx")
        self._provider = TracerProvider(
            resource=Resource.create(
                {"service.name": name, "phalanx.part": "rank", "phalanx.rank": rank}
            ),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("phalanx.rank")
        self._extract = TraceContextTextMapPropagator().extract
        self._rank = rank

    def watch(self, launch: Launch) -> Launch:
        """`launch`, with a span for each step that its plan names a parent of."""

        def watched(plan: StepPlan) -> PendingStep:
            if not plan.traces:
                return launch(plan)
            began = time.time_ns()
            step = launch(plan)
            # a device may still compute: then the span ends with the result
            if step.is_done:
                self._tell(plan, began)
                return step
            return PendingStep(lambda: self._finish(step, plan, began), lambda: step.is_done)

        return watched

    def _finish(self, step: PendingStep, plan: StepPlan, began: int) -> StepResult:
        result = step.result()
        self._tell(plan, began)
        return result

    def _tell(self, plan: StepPlan, began: int) -> None:
        ended = time.time_ns()
        attributes: dict[str, Any] = {
            "phalanx.rank": self._rank,
            "phalanx.epoch": plan.epoch,
            "phalanx.step": plan.step,
            "phalanx.rows": len(plan.rows),
            "phalanx.tokens": plan.num_tokens,
        }
        for parent in plan.traces:
            context = self._extract({"traceparent": parent})
            span = self._tracer.start_span("step", context, attributes=attributes, start_time=began)
            span.end(ended)

    def close(self) -> None:
        """Send what is left, in little time."""
        self._provider.force_flush(LAST_WORDS_MS)


def step_spans(spec: WorkerSpec, rank: int) -> StepSpans | None:
    """What the group's spec asks for; None, with a warning, where OpenTelemetry is missing."""
    if not spec.trace_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("rank %d tells nothing to traces: OpenTelemetry is not installed here", rank)
        return None
    exporter = OTLPSpanExporter(endpoint=spec.trace_endpoint, timeout=EXPORT_TIMEOUT_S)
    return StepSpans(BatchSpanProcessor(exporter), rank)
