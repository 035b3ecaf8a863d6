"""How requests end before their time: cancels, deadlines, errors, slow readers, shutdown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from phalanx.controller.client import AsyncClient
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.errors import (
    AlreadyExists,
    DeadlineExceeded,
    GroupLost,
    PhalanxError,
    RequestFailed,
    ResourceExhausted,
    Unavailable,
)
from phalanx.protos.steps import SampledToken, TokenLogprob
from phalanx.protos.v1 import serving_pb2, serving_pb2_grpc

Batches = AsyncIterator[list[TokenEvent]]


async def endless(submission: Any) -> Batches:
    """A token every few milliseconds, until aborted or closed."""
    first = 0
    while not submission.aborted.is_set():
        yield [submission.event([50], first)]
        first += 1
        await asyncio.sleep(0.002)
    yield [submission.event((), first, finish=FinishReason.ABORT)]


async def silent(submission: Any) -> Batches:
    """Admitted, and then nothing."""
    await asyncio.sleep(3600)
    yield []


def scored(token: int) -> SampledToken:
    """With twenty alternatives: some 400 bytes in a message."""
    top = [TokenLogprob(token_id=t, logprob=-1.0, rank=t + 1) for t in range(20)]
    return SampledToken(seq=0, token_id=token, logprob=top[0], top=top)


@pytest.mark.parametrize("script", [endless, silent])
def test_a_cancel_closes_the_request_at_once(serve: Any, script: Any, eventually: Any) -> None:
    async def main() -> None:
        async with serve(script) as served:
            call = served.client._stub.Generate(serving_pb2.GenerateRequest(text="a"))
            if script is endless:
                await call.read()
            else:
                waiting = asyncio.ensure_future(call.read())
            await eventually(lambda: served.engine.submissions)
            call.cancel()
            (asked,) = served.engine.submissions
            await asyncio.wait_for(asked.closed.wait(), 10)
            assert not asked.exhausted
            await eventually(lambda: served.books.ended)
            assert served.books.ended[0][0] == "cancelled"
            if script is silent:
                with pytest.raises(asyncio.CancelledError):
                    await waiting

    asyncio.run(main())


def test_leaving_the_iterator_cancels(serve: Any, eventually: Any) -> None:
    async def main() -> None:
        async with serve(endless) as served:
            stream = served.client.generate("a")
            async for _ in stream:
                break
            await stream.aclose()
            await asyncio.wait_for(served.engine.submissions[0].closed.wait(), 10)

    asyncio.run(main())


def test_a_vanished_client_frees_its_requests(serve: Any, eventually: Any) -> None:
    async def main() -> None:
        async with serve(endless) as served:
            client = AsyncClient(served.address)
            streams = [client.generate("a") for _ in range(5)]
            for stream in streams:
                await anext(stream)
            await client.close()
            await eventually(lambda: not served.engine.live)
            for stream in streams:
                with pytest.raises((PhalanxError, asyncio.CancelledError, StopAsyncIteration)):
                    while True:
                        await anext(stream)

    asyncio.run(main())


def test_the_deadline_reaches_the_engine_and_ends_the_call(serve: Any, eventually: Any) -> None:
    async def main() -> None:
        async with serve(endless) as served:
            async with AsyncClient(served.address, timeout=1.0) as client:
                before = time.monotonic()
                with pytest.raises(DeadlineExceeded):
                    await client.complete("a")
                after = time.monotonic()
            (asked,) = served.engine.submissions
            assert before + 0.95 < asked.deadline < after + 0.05
            await asyncio.wait_for(asked.closed.wait(), 10)
            await eventually(lambda: served.books.ended)
            assert served.books.ended[0][0] == "deadline_exceeded"

    asyncio.run(main())


def test_without_a_deadline_none_is_passed(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            async with AsyncClient(served.address) as client:
                await client.complete("a")
            assert served.engine.submissions[0].deadline is None

    asyncio.run(main())


def test_the_engines_deadline_is_a_status(serve: Any) -> None:
    async def script(submission: Any) -> Batches:
        yield [submission.event([50, 51])]
        yield [submission.event((), 2, finish=FinishReason.DEADLINE)]

    async def main() -> None:
        async with serve(script) as served:
            pieces = []
            with pytest.raises(DeadlineExceeded, match="after 2 tokens"):
                async for message in served.client.generate("a"):
                    pieces += message.samples[0].token_ids
            assert pieces == [50, 51]
            assert served.books.ended[0] == ("deadline_exceeded", 2, 2)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RequestFailed("the logits are not finite"), RequestFailed),
        (GroupLost("rank 1 was lost"), Unavailable),
        (ResourceExhausted("no KV blocks", 2.5), ResourceExhausted),
        (None, RequestFailed),
    ],
)
def test_an_error_ends_its_own_stream_only(
    serve: Any, words: list[int], error: Any, kind: Any
) -> None:
    async def script(submission: Any) -> Batches:
        bad = submission.request_id == "bad"
        for first, token in enumerate(words):
            await asyncio.sleep(0.002)
            if bad and first == 3:
                yield [submission.event((), 3, finish=FinishReason.ERROR, error=error)]
                return
            last = {"finish": FinishReason.LENGTH} if first + 1 == len(words) else {}
            yield [submission.event([token], first, **last)]

    async def main() -> None:
        async with serve(script) as served:
            good = asyncio.create_task(served.client.complete("a", request_id="good"))
            read = []
            with pytest.raises(kind) as caught:
                async for message in served.client.generate("a", request_id="bad"):
                    read += message.samples[0].token_ids
            assert read == words[:3]
            assert str(caught.value) == (str(error) if error else "the request failed")
            if isinstance(error, ResourceExhausted):
                assert caught.value.retry_after_s == 2.5
            assert list((await good).token_ids) == words

    asyncio.run(main())


@pytest.mark.parametrize(
    "refusal",
    [AlreadyExists("taken"), ResourceExhausted("the queue is full", 1.5), Unavailable("not yet")],
)
def test_a_refusal_is_a_status(serve: Any, refusal: PhalanxError) -> None:
    async def script(submission: Any) -> Batches:
        raise refusal
        yield []

    async def main() -> None:
        async with serve(script) as served:
            with pytest.raises(type(refusal), match=str(refusal)):
                await served.client.complete("a")
            assert served.books.ended[0][0] == refusal.status.lower()

    asyncio.run(main())


def test_a_full_queue_says_when_to_come_again(serve: Any) -> None:
    async def script(submission: Any) -> Batches:
        raise ResourceExhausted("the queue is full", 1.5)
        yield []

    async def main() -> None:
        async with serve(script) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in served.client._stub.Generate(serving_pb2.GenerateRequest(text="a")):
                    pass
            assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1500"

    asyncio.run(main())


def test_a_defect_gives_an_incident_and_no_secrets(serve: Any, caplog: Any) -> None:
    words = "secret-words"

    async def script(submission: Any) -> Batches:
        raise ValueError(words)
        yield []

    async def main() -> None:
        async with serve(script) as served:
            with pytest.raises(
                RequestFailed, match=r"^internal error, incident [0-9a-f]{12}$"
            ) as e:
                await served.client.complete("a")
            incident = str(e.value).split()[-1]
            assert incident in caplog.text
            assert "ValueError" in caplog.text
            assert "test_endings.py" in caplog.text
            assert "secret-words" not in caplog.text

    asyncio.run(main())


def test_an_engine_that_stops_talking_is_an_error(serve: Any) -> None:
    async def script(submission: Any) -> Batches:
        yield [submission.event([50])]

    async def main() -> None:
        async with serve(script) as served:
            with pytest.raises(RequestFailed, match="ended the request early"):
                await served.client.complete("a")

    asyncio.run(main())


def test_abort_ends_the_stream_with_its_own_reason(serve: Any) -> None:
    async def main() -> None:
        async with serve(endless) as served:
            async for message in served.client.generate("a", request_id="mine"):
                if not served.engine.submissions[0].aborted.is_set():
                    await served.client.abort("mine")
                last = message
            assert last.samples[0].finish_reason == 3  # FINISH_REASON_ABORT
            assert last.usage.completion_tokens > 0
            assert served.books.ended[0][0] == "abort"

    asyncio.run(main())


def test_a_slow_reader_gets_fewer_and_larger_messages(serve: Any) -> None:
    """Everything arrives, in order, merged; nobody waits for the reader."""
    count = 60_000
    done = asyncio.Event()

    async def script(submission: Any) -> Batches:
        for first in range(0, count, 20):
            if first + 20 == count:
                done.set()
            last = {"finish": FinishReason.LENGTH} if first + 20 == count else {}
            yield [submission.event([50 + first % 200] * 20, first, **last)]
            if first % 1000 == 0:
                await asyncio.sleep(0)

    async def main() -> None:
        async with serve(script) as served:
            call = served.client._stub.Generate(serving_pb2.GenerateRequest(text="a"))
            messages = [await call.read()]
            await asyncio.wait_for(done.wait(), 20)
            read = list(messages[0].samples[0].token_ids)
            while (message := await call.read()) is not grpc.aio.EOF:
                assert message.samples[0].first_token_index == len(read)
                read += message.samples[0].token_ids
                messages.append(message)
            assert read == [50 + first % 200 for first in range(0, count, 20) for _ in range(20)]
            assert len(messages) < count / 20 / 3
            assert messages[-1].usage.completion_tokens == count

    asyncio.run(main())


def test_what_a_reader_leaves_unread_is_bounded(serve: Any, eventually: Any) -> None:
    async def script(submission: Any) -> Batches:
        first = 0
        while True:
            yield [submission.event([scored(50)] * 50, first)]
            first += 50
            await asyncio.sleep(0)

    async def main() -> None:
        async with serve(script) as served:
            call = served.client._stub.Generate(serving_pb2.GenerateRequest(text="a"))
            await eventually(lambda: served.engine.submissions)
            (asked,) = served.engine.submissions
            await asyncio.wait_for(asked.closed.wait(), 20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while True:
                    await call.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "wait to be read" in caught.value.details()

    asyncio.run(main())


def test_a_reader_that_stops_is_let_go(serve: Any, eventually: Any) -> None:
    """Its request leaves the engine, although not enough piles up to be too much."""

    async def script(submission: Any) -> Batches:
        for first in range(0, 7000, 50):
            yield [submission.event([scored(50)] * 50, first)]
            await asyncio.sleep(0)
        await asyncio.sleep(3600)

    async def main() -> None:
        async with serve(script, service={"max_stall_s": 0.3}) as served:
            window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
            async with grpc.aio.insecure_channel(served.address, window) as channel:
                stub: Any = serving_pb2_grpc.InferenceServiceStub(channel)
                call = stub.Generate(serving_pb2.GenerateRequest(text="a"))
                await eventually(lambda: served.engine.submissions)
                (asked,) = served.engine.submissions
                await asyncio.wait_for(asked.closed.wait(), 10)
                await eventually(lambda: served.books.ended)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    while True:
                        await asyncio.wait_for(call.read(), 5)
            assert "not read for 0.3 s" in caught.value.details()
            assert served.books.ended[0][0] == "resource_exhausted"

    asyncio.run(main())


def test_a_drain_lets_running_requests_finish(serve: Any, words: list[int], say: Any) -> None:
    async def main() -> None:
        go_on = asyncio.Event()
        async with serve(say(words, pause=go_on.wait)) as served:
            served.host.set_serving(True)
            running = asyncio.create_task(served.client.complete("a"))
            while not served.engine.submissions:
                await asyncio.sleep(0.005)
            stopping = asyncio.create_task(served.host.stop(60.0))
            await asyncio.sleep(0)
            assert not await served.client.healthy()
            with pytest.raises(Unavailable, match="shutting down"):
                await served.client.complete("b")
            go_on.set()
            assert list((await running).token_ids) == words
            await asyncio.wait_for(stopping, 20)
            with pytest.raises(Unavailable):
                await served.client.complete("c")
            assert len(served.engine.submissions) == 1

    asyncio.run(main())


def test_a_drain_ends_what_outlasts_its_grace(serve: Any) -> None:
    async def main() -> None:
        async with serve(endless) as served:
            stream = served.client.generate("a")
            await anext(stream)
            stopping = asyncio.create_task(served.host.stop(0.2))
            with pytest.raises(Unavailable, match="shutting down"):
                async for _ in stream:
                    pass
            await asyncio.wait_for(stopping, 20)
            assert served.engine.submissions[0].closed.is_set()

    asyncio.run(main())
