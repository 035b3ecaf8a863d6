"""Traces of calls: whose child a call is, what its spans say, and what they never hold."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from phalanx.controller.config import ClusterConfig
from phalanx.controller.openai.host import OpenAIHost
from phalanx.controller.tracing.context import TRACE
from phalanx.controller.tracing.setup import make_tracing, with_endpoint
from phalanx.controller.tracing.spans import SpanTracing
from phalanx.protos.errors import ConfigError
from phalanx.protos.v1 import serving_pb2, serving_pb2_grpc
from phalanx.workers.pending import PendingStep
from phalanx.workers.tracing import StepSpans

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
SECRET = "geese"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> SpanTracing:
    return SpanTracing(SimpleSpanProcessor(spans), model="tiny", ratio=0.0)


def one(spans: InMemorySpanExporter, name: str) -> Any:
    [found] = [span for span in spans.get_finished_spans() if span.name == name]
    return found


def test_a_call_is_its_callers_child(
    serve: Any, say: Any, spans: InMemorySpanExporter, tracing: SpanTracing
) -> None:
    seen: list[Any] = []

    async def script(submission: Any) -> Any:
        seen.append(TRACE.get())
        async for batch in say([50, 51])(submission):
            yield batch

    async def main() -> None:
        async with (
            serve(script, service={"tracing": tracing}) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            stub: Any = serving_pb2_grpc.InferenceServiceStub(channel)
            for request_id in ("", "mine"):  # of the call alone, and one that outlives it
                request = serving_pb2.GenerateRequest(text=SECRET, request_id=request_id)
                async for _ in stub.Generate(request, metadata=[("traceparent", PARENT)]):
                    pass
            async for _ in stub.Generate(serving_pb2.GenerateRequest(text=SECRET)):
                pass
            wrong = serving_pb2.GenerateRequest(text=SECRET)
            wrong.params.temperature = -1
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in stub.Generate(wrong, metadata=[("traceparent", PARENT)]):
                    pass

    asyncio.run(main())
    assert [trace is not None for trace in seen] == [True, True, False]
    calls = spans.get_finished_spans()
    assert [span.parent.span_id for span in calls] == [int(PARENT_ID, 16)] * 3
    assert {span.context.trace_id for span in calls} == {int(TRACE_ID, 16)}
    assert [span.attributes["phalanx.outcome"] for span in calls] == [
        *("length", "length"),
        "invalid_argument",
    ]
    assert [span.status.is_ok for span in calls] == [True, True, False]
    assert calls[1].attributes["phalanx.request_id"] == "mine"
    assert calls[0].attributes["gen_ai.usage.output_tokens"] == 2
    assert SECRET not in " ".join(span.to_json() for span in calls)


def test_http_headers_count_as_well_and_the_next_request_is_alone(
    serve: Any, say: Any, spans: InMemorySpanExporter, tracing: SpanTracing
) -> None:
    import httpx

    async def main() -> None:
        async with serve(say([50]), service={"tracing": tracing}) as served:
            host = OpenAIHost(served.service)
            await host.start()
            async with httpx.AsyncClient(base_url=host.url, timeout=30) as http:
                for headers in ({"traceparent": PARENT}, {}, {"traceparent": "00-nonsense"}):
                    body = {"model": "tiny", "prompt": SECRET}
                    answer = await http.post("/completions", json=body, headers=headers)
                    assert answer.status_code == 200
            await host.stop(0)

    asyncio.run(main())
    [call] = spans.get_finished_spans()
    assert call.parent.span_id == int(PARENT_ID, 16)


def test_phases_follow_one_another_and_begin_anew_after_a_loss(
    spans: InMemorySpanExporter, tracing: SpanTracing
) -> None:
    trace = tracing.begin("Chat", (PARENT, ""))
    assert trace is not None
    trace.admitted("r", 7)
    trace.placed("replica-0", 7)
    above = trace.stepped(decoding=False)
    assert above.split("-")[1] == TRACE_ID
    ahead = trace.stepped(decoding=True)  # it leaves before the first token is here
    assert ahead and ahead != above
    trace.got_tokens(1)
    trace.lost()
    trace.homeless()
    assert trace.stepped(decoding=True) == ""  # planned before the loss was known
    trace.placed("replica-1", 8)
    trace.stepped(decoding=False)
    trace.got_tokens(1)
    told = [bool(trace.stepped(decoding=True)) for _ in range(9)]
    assert told == [True, True, False, True, False, False, False, True, False]
    trace.finished()
    assert trace.stepped(decoding=True) == ""
    trace.end("stop", 2)
    found = [span for span in spans.get_finished_spans() if span.name != "Chat"]
    root = one(spans, "Chat").context.span_id
    assert {span.parent.span_id for span in found} == {root}
    lost = [span.name for span in found if not span.status.is_ok and span.status.description]
    assert lost == ["decode"]
    places = [span.attributes for span in found if span.name == "queue"]
    assert [item["phalanx.replica"] for item in places] == ["replica-0", "replica-1"]


def test_a_rank_tells_of_the_steps_that_it_is_asked_for(
    spans: InMemorySpanExporter,
) -> None:
    from phalanx.protos.steps import Row, StepPlan, StepResult

    ranks = StepSpans(SimpleSpanProcessor(spans), rank=3)
    arrived = [False]

    def launch(plan: StepPlan) -> PendingStep:
        result = StepResult(epoch=0, step=plan.step, sampled=[])
        return PendingStep(lambda: result, lambda: arrived[0])

    watched = ranks.watch(launch)

    def plan(step: int, traces: list[str]) -> StepPlan:
        row = Row(seq=1, num_new=4, new_blocks=[])
        return StepPlan(0, step, [], [], [], [row], traces)

    watched(plan(0, [])).result()
    later = watched(plan(1, [PARENT]))
    assert spans.get_finished_spans() == () and not later.is_done
    arrived[0] = True
    assert later.result().step == 1
    watched(plan(2, [PARENT, PARENT])).result()
    found = spans.get_finished_spans()
    assert [span.attributes["phalanx.step"] for span in found] == [1, 2, 2]
    assert {span.parent.span_id for span in found} == {int(PARENT_ID, 16)}
    assert found[0].attributes["phalanx.tokens"] == 4
    assert found[0].resource.attributes["phalanx.rank"] == 3


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    off = with_endpoint(ClusterConfig(model="smollm2"))
    assert off.trace_endpoint is None and make_tracing(off, "tiny") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    named = with_endpoint(ClusterConfig(model="smollm2"))
    assert named.trace_endpoint == "http://127.0.0.1:1"
    given = ClusterConfig(model="smollm2", trace_endpoint="http://127.0.0.1:2")
    assert with_endpoint(given).trace_endpoint == "http://127.0.0.1:2"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'http/protobuf'"):
        with_endpoint(given)


def test_where_it_is_missing_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    assert importlib.util.find_spec("opentelemetry.sdk") is not None
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    config = ClusterConfig(model="smollm2", trace_endpoint="http://127.0.0.1:2")
    with pytest.raises(ConfigError, match=r"phalanx\[trace\]"):
        with_endpoint(config)
