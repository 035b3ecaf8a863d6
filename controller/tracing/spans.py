"""Spans of a request, in OpenTelemetry's terms.

A tree has the call at its root, or below its caller's span; below it, one after the other and again
after a loss: `placement`, `queue`, `prefill`, `decode`; and the ranks' steps below the latter two. No
attribute holds what users wrote.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

PREFILL_STEPS = 16
"""Of a request's prompt, the ranks tell of so many steps; later of the 1st, 2nd, 4th, 8th, ..."""
GOOD = {"stop", "length", "cancelled", "abort"}


class SpanTracing:
    """`Tracing` over a span processor; `close` it. ratio: part of the requests that are traced, of
    those whose callers do not decide it by the flag of their `traceparent`."""

    def __init__(self, processor: SpanProcessor, *, model: str, ratio: float = 1.0) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create(
                {
                    "service.name": os.environ.get("OTEL_SERVICE_NAME", "phalanx"),
                    "phalanx.part": "controller",
                }
            ),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("phalanx")
        self._model = model

    def begin(self, method: str, parent: tuple[str, str]) -> SpanTrace | None:
        """See `Tracing.begin`; what is no traceparent begins a trace of its own."""
        carrier = dict(zip(("traceparent", "tracestate"), parent, strict=True))
        context = TraceContextTextMapPropagator().extract(carrier)
        attributes = {"rpc.method": method, "gen_ai.request.model": self._model}
        span = self._tracer.start_span(
            method, context=context, kind=SpanKind.SERVER, attributes=attributes
        )
        return SpanTrace(self._tracer, span) if span.is_recording() else None

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


@dataclass(slots=True)
class _Phase:
    span: Span
    parent: str
    """Its `traceparent`."""
    steps: int = 0


class SpanTrace:
    """`RequestTrace` as spans below `root`. `prefill` ends with the first token; `decode`
    may have begun by then, as plans leave before the results of those before them."""

    def __init__(self, tracer: trace.Tracer, root: Span) -> None:
        self._tracer, self._root = tracer, root
        self._lock = threading.Lock()
        self._open: dict[str, _Phase] = {}
        self._tokens = 0
        self._began = self._since = time.time_ns()

    @property
    def trace_id(self) -> str:
        """See `RequestTrace`."""
        return trace.format_trace_id(self._root.get_span_context().trace_id)

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        """See `RequestTrace`."""
        self._root.set_attribute("phalanx.request_id", request_id)
        self._root.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
        self._since = time.time_ns()

    def placed(self, replica_id: str, uncached_tokens: int) -> None:
        """See `RequestTrace`."""
        with self._lock:
            placement = self._begin("placement", self._since)
            placement.span.set_attribute("phalanx.replica", replica_id)
            placement.span.set_attribute("phalanx.uncached_tokens", uncached_tokens)
            self._close("placement")
            self._begin("queue").span.set_attribute("phalanx.replica", replica_id)

    def homeless(self) -> None:
        """See `RequestTrace`."""
        with self._lock:
            self._begin("placement", self._since).span.set_attribute("phalanx.homeless", True)

    def stepped(self, *, decoding: bool) -> str:
        """See `RequestTrace`."""
        with self._lock:
            if not self._open.keys() & {"queue", "prefill", "decode"}:
                return ""  # its end, or that of its ranks, is on the way
            self._close("queue")
            phase = self._begin("decode" if decoding else "prefill")
            phase.steps += 1
            if decoding:
                told = phase.steps & (phase.steps - 1) == 0
            else:
                told = phase.steps <= PREFILL_STEPS
            return phase.parent if told else ""

    def got_tokens(self, count: int) -> None:
        """See `RequestTrace`."""
        with self._lock:
            if not self._tokens:
                seconds = (time.time_ns() - self._began) / 1e9
                self._root.set_attribute("gen_ai.server.time_to_first_token", seconds)
            if self._open:
                self._begin("decode")
                self._close("prefill")
            self._tokens += count

    def lost(self) -> None:
        """See `RequestTrace`."""
        with self._lock:
            for phase in self._open.values():
                phase.span.set_status(Status(StatusCode.ERROR, "its ranks are gone"))
            self._close(*self._open)
            self._since = time.time_ns()

    def finished(self) -> None:
        """See `RequestTrace`."""
        with self._lock:
            self._close(*self._open)

    def end(self, outcome: str, completion_tokens: int) -> None:
        """See `RequestTrace`."""
        root = self._root
        root.set_attribute("phalanx.outcome", outcome)
        root.set_attribute("gen_ai.usage.output_tokens", completion_tokens)
        if outcome not in GOOD:
            root.set_status(Status(StatusCode.ERROR, outcome))
        root.end()

    def _begin(self, name: str, start: int | None = None) -> _Phase:
        """The open phase of this name, a new one if there is none."""
        if name not in self._open:
            above = trace.set_span_in_context(self._root)
            span = self._tracer.start_span(name, above, start_time=start)
            carrier: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
            self._open[name] = _Phase(span, carrier["traceparent"])
        return self._open[name]

    def _close(self, *names: str) -> None:
        for name in names:
            phase = self._open.pop(name, None)
            if phase is None:
                continue
            if phase.steps:
                phase.span.set_attribute("phalanx.steps", phase.steps)
            if name == "decode":
                phase.span.set_attribute("gen_ai.usage.output_tokens", self._tokens)
            phase.span.end()
