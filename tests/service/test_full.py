"""Requests that come when there is no room: refused for little, unless they are no new work."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from typing import Any

import grpc
import pytest

from phalanx.controller.logs import logged_to
from phalanx.protos.errors import ResourceExhausted
from phalanx.protos.status import DETAILS_KEY, PUSHBACK_KEY
from phalanx.protos.v1 import serving_pb2, serving_pb2_grpc

FULL = ResourceExhausted("the queue is full", 1.25)
BAD = 10**9
"""No token id: whoever looks at the request says so."""


def test_a_refusal_comes_before_the_request_is_looked_at(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served, grpc.aio.insecure_channel(served.address) as channel:
            served.engine.full = FULL
            stub: Any = serving_pb2_grpc.InferenceServiceStub(channel)
            request = serving_pb2.GenerateRequest()
            request.token_ids.ids.append(BAD)
            call = stub.Generate(request, timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            trailers = dict(caught.value.trailing_metadata())
            assert trailers[PUSHBACK_KEY] == "1250" and DETAILS_KEY in trailers
            assert not served.engine.submissions
            assert served.books.ended == [("resource_exhausted", 0, 0)]

    asyncio.run(main())


def test_who_joins_or_resumes_what_was_accepted_is_let_in(
    serve: Any, say: Any, words: list[int]
) -> None:
    async def main() -> None:
        went_on = asyncio.Event()
        async with serve(say(words[:3], pause=went_on.wait)) as served:
            first = asyncio.create_task(served.client.complete("a", request_id="mine", seed=1))
            while not served.engine.submissions:
                await asyncio.sleep(0.01)
            served.engine.full = FULL
            joins = asyncio.create_task(served.client.complete("a", request_id="mine", seed=1))
            with pytest.raises(ResourceExhausted) as refused:
                await served.client.complete("a", request_id="another", seed=1)
            assert refused.value.retry_after_s == 1.25
            went_on.set()
            assert (await first).token_ids == (await joins).token_ids == tuple(words[:3])
            again = await served.client.complete("a", request_id="mine", seed=1)
            assert again.token_ids == tuple(words[:3]), "it has ended, and is kept"
            assert len(served.engine.submissions) == 1
            served.engine.full = None
            assert (await served.client.complete("a", request_id="another", seed=1)).token_ids

    asyncio.run(main())


def test_too_many_calls_are_refused_by_us_and_health_checks_are_not(
    serve: Any, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.controller.server.host.MAX_CONCURRENT_CALLS", 2)

    async def main() -> None:
        never = asyncio.Event()
        async with serve(say([50], pause=never.wait)) as served:
            held = [asyncio.create_task(served.client.complete("a")) for _ in "ab"]
            while len(served.engine.submissions) < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(ResourceExhausted) as refused:
                await served.client.complete("a")
            assert refused.value.retry_after_s > 0
            assert not await served.client.healthy()  # it answers: it was never set to serve
            never.set()
            await asyncio.gather(*held)
            assert (await served.client.complete("a")).token_ids

    asyncio.run(main())


def test_refusals_share_a_line_of_the_log(serve: Any, say: Any) -> None:
    logging.getLogger("phalanx").setLevel("INFO")

    async def main() -> str:
        with logged_to(stream := io.StringIO(), "json"):
            async with serve(say([50])) as served:
                served.engine.full = FULL
                for _ in range(20):
                    with pytest.raises(ResourceExhausted):
                        await served.client.complete("a")
                await asyncio.sleep(1.1)
        return stream.getvalue()

    lines = [json.loads(line) for line in asyncio.run(main()).splitlines()]
    assert sum(line["refused"] for line in lines) == 20
    assert len(lines) <= 2
