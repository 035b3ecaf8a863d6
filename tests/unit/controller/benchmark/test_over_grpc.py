"""The load generator and the client over a real connection, against a servicer of few lines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from phalanx.controller.benchmark.session import Outcome, run_benchmark
from phalanx.controller.benchmark.settings import Settings
from phalanx.controller.client import AsyncClient
from phalanx.protos.v1 import serving_pb2, serving_pb2_grpc, types_pb2


class Servicer(serving_pb2_grpc.InferenceServiceServicer):  # type: ignore[misc]
    """Writes the asked number of tokens, two a message; refuses every fifth request."""

    def __init__(self) -> None:
        self.asked: list[serving_pb2.GenerateRequest] = []

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request)
        if len(self.asked) % 5 == 0:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        left = request.params.max_tokens
        while left:
            count, first = min(2, left), request.params.max_tokens - left
            left -= count
            sample = types_pb2.SampleDelta(token_ids=[9] * count, first_token_index=first)
            if not left:
                sample.finish_reason = types_pb2.FINISH_REASON_LENGTH
            yield serving_pb2.GenerateResponse(samples=[sample])

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return serving_pb2.GetModelInfoResponse(name="tiny", vocab_size=50, max_context=100)

    async def GetClusterState(self, request: Any, context: Any) -> Any:
        return serving_pb2.GetClusterStateResponse(queued_requests=0)


async def measured(servicer: Servicer, settings: Settings) -> Outcome:
    server = grpc.aio.server()
    serving_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            return await run_benchmark(client, settings, lambda name, total: lambda item: None)
    finally:
        await server.stop(None)


def test_a_closed_loop_over_a_connection() -> None:
    servicer = Servicer()
    settings = Settings(
        requests=10, concurrency=3, warmup=2, prompt_tokens="3-6", output_tokens="5"
    )
    outcome = asyncio.run(measured(servicer, settings))
    assert outcome.results.statuses == {"OK": 8, "RESOURCE_EXHAUSTED": 2}
    assert outcome.results.errors == {"RESOURCE_EXHAUSTED": "the queue is full"}
    assert outcome.results.output_tokens == 40
    assert len(servicer.asked) == 12
    for request in servicer.asked:
        assert 3 <= len(request.token_ids.ids) <= 6
        assert request.params.ignore_eos and request.params.temperature == 0
    for item in outcome.attempts:
        if item.ok:
            assert [count for _, count in item.arrivals] == [2, 2, 1]
            assert item.due_s <= item.sent_s <= item.arrivals[0][0] <= item.end_s


def test_an_open_loop_over_a_connection() -> None:
    settings = Settings(requests=20, rate=500.0, warmup=0, prompt_tokens="8", output_tokens="1")
    outcome = asyncio.run(measured(Servicer(), settings))
    assert outcome.results.sent == 20 and outcome.results.completed == 16
    assert outcome.report["settings"]["mode"] == "open"
