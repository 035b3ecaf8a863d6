"""Requests that outlive their calls: ids, joining, resuming, grace, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from phalanx.controller.client import AsyncClient
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    RequestFailed,
    ResourceExhausted,
    StreamLost,
)
from phalanx.protos.v1 import serving_pb2

Batches = AsyncIterator[list[TokenEvent]]
RESUMING = {"reconnect_s": 20.0}


async def status_of(resumed: Any, client: AsyncClient, request_id: str, *next_index: int) -> Any:
    """(status, text) of a `Resume` that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await resumed(client, request_id, *next_index)
    return caught.value.code(), caught.value.details()


def test_resume_from_every_index_gives_the_rest(
    serve: Any, words: list[int], say: Any, served_model: Any, pacer: Any, resumed: Any, play: Any
) -> None:
    """Of a finished request and of one that runs."""

    async def main() -> None:
        paced = pacer()
        for script in (say(words), paced):
            paced.allow(0)
            async with serve(script, client=RESUMING) as served:
                asking = asyncio.create_task(
                    served.client.complete("a", request_id="mine", logprobs=1, stop=["\x00"])
                )
                await asyncio.sleep(0.05)
                if script is not paced:
                    await asking
                readers = [
                    asyncio.create_task(resumed(served.client, "mine", start))
                    for start in range(len(words) if script is not paced else 11)
                ]
                await asyncio.sleep(0.05)
                paced.allow(10)
                whole = await asking
                for start, (tokens, text, scores, usage) in enumerate(
                    await asyncio.gather(*readers)
                ):
                    assert tuple(tokens) == whole.token_ids[start:]
                    before = served_model.tokenizer.decode(list(whole.token_ids[:start]))
                    assert before + text == whole.text
                    assert len(scores) in (0, len(tokens))
                    assert usage == whole.usage

    play(main)


def test_the_same_id_with_the_same_body_runs_once(serve: Any, pacer: Any, play: Any) -> None:
    """Both at once, and again when it has ended; the drawn seed is the first one's."""

    async def main() -> None:
        paced = pacer()
        async with serve(paced, client=RESUMING) as served:
            asking = [
                asyncio.create_task(served.client.complete("a", request_id="mine", n=2))
                for _ in range(5)
            ]
            await asyncio.sleep(0.1)
            paced.allow(10)
            answers = [await task for task in asking]
            answers.append(await served.client.complete("a", request_id="mine", n=2))
            assert len(served.engine.submissions) == 1
            assert len({answer.seed for answer in answers}) == 1
            for answer in answers:
                assert [list(sample.token_ids) for sample in answer.samples] == [
                    [50 + place for place in range(10)]
                ] * 2

    play(main)


@pytest.mark.parametrize("ended", [False, True])
def test_another_body_is_refused_and_another_tenant_is_another_world(
    serve: Any, token_file: str, ended: bool, pacer: Any, resumed: Any, play: Any
) -> None:
    async def main() -> None:
        paced = pacer()
        async with serve(paced, token="r-1", client=RESUMING, token_file=token_file) as served:
            paced.allow(10 if ended else 3)
            asking = asyncio.create_task(served.client.complete("a", request_id="mine", seed=1))
            await asyncio.sleep(0.1)
            assert asking.done() is ended
            for prompt, params in (("b", {"seed": 1}), ("a", {"seed": 2}), ("a", {})):
                with pytest.raises(AlreadyExists, match="mine"):
                    await served.client.complete(prompt, request_id="mine", **params)
            with pytest.raises(AlreadyExists):
                await served.client.ask("a", request_id="mine", seed=1)
            async with AsyncClient(served.address, token="b", timeout=10) as blue:
                foreign = await status_of(resumed, blue, "mine")
                assert foreign[0] is grpc.StatusCode.NOT_FOUND
                # nothing tells a foreign id from one that nobody has
                assert foreign[1].replace("mine", "X") == (await status_of(resumed, blue, "none"))[
                    1
                ].replace("none", "X")
                with pytest.raises(NotFound):
                    await blue.abort("mine")
                paced.allow(10)
                await blue.complete("b", request_id="mine")  # its own
            assert (await asking).token_ids == tuple(50 + place for place in range(10))
            async with AsyncClient(served.address, token="r-2", timeout=10) as red:
                assert (await resumed(red, "mine", 7))[0] == [57, 58, 59]

    play(main)


def test_bad_resumes_are_named(serve: Any, say: Any, play: Any, resumed: Any) -> None:
    async def main() -> None:
        async with serve(say([50]), client=RESUMING) as served:
            await served.client.complete("a", request_id="mine")
            for request_id, starts in (("", ()), ("a b", ()), ("mine", (0, 0)), ("mine", (0,) * 9)):
                code, text = await status_of(resumed, served.client, request_id, *starts)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert ("next_index" if starts else "request_id") in text

    play(main)


def test_without_an_id_a_dropped_request_ends_at_once_and_with_one_after_its_grace(
    serve: Any, eventually: Any, pacer: Any, resumed: Any, play: Any
) -> None:
    async def main() -> None:
        paced = pacer(100)
        paced.allow(3)
        async with serve(paced, service={"grace_s": 2.0}) as served:
            calls = [
                served.client._stub.Generate(
                    serving_pb2.GenerateRequest(text="a", request_id=request_id)
                )
                for request_id in ("", "back", "gone")
            ]
            for call in calls:
                await call.read()
            asked = {item.request_id: item for item in served.engine.submissions}
            back, gone = asked.pop("back"), asked.pop("gone")
            [nameless] = asked.values()
            for call in calls:
                call.cancel()
            await eventually(nameless.closed.is_set)
            assert not back.closed.is_set()
            returned = served.client._stub.Resume(serving_pb2.ResumeRequest(request_id="back"))
            await returned.read()
            await eventually(gone.closed.is_set)
            assert not back.closed.is_set()
            paced.allow(5)
            tokens, _, _, usage = await resumed(served.client, "gone")
            assert tokens == [50, 51, 52]
            assert usage.completion_tokens == 3
            paced.allow(100)
            assert len((await resumed(served.client, "back"))[0]) == 100
            returned.cancel()

    play(main)


def test_a_reader_that_leaves_on_purpose_frees_its_request_at_once(
    serve: Any, eventually: Any, pacer: Any, play: Any
) -> None:
    """By leaving the loop, by cancelling the task, by closing the client; no grace runs out."""

    async def leave(served: Any, how: str) -> None:
        async with AsyncClient(served.address, timeout=30) as client:
            stream = client.generate("a")
            await anext(stream)
            if how == "loop":
                await stream.aclose()
            elif how == "task":
                task = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await stream.aclose()

    async def main() -> None:
        paced = pacer(100)
        paced.allow(1)
        async with serve(paced) as served:
            for how in ("loop", "task", "client"):
                await leave(served, how)
            await eventually(
                lambda: all(item.closed.is_set() for item in served.engine.submissions)
            )
            assert len(served.engine.submissions) == 3

    play(main)


def test_a_refused_request_leaves_its_id_free_and_a_failed_one_does_not(
    serve: Any, play: Any
) -> None:
    async def main() -> None:
        turns = iter([ResourceExhausted("full", 0.01), None, RequestFailed("broken")])

        async def script(submission: Any) -> Batches:
            error = next(turns)
            if isinstance(error, ResourceExhausted):
                raise error
            yield [submission.event([50])]
            if error is not None:
                raise error
            yield [submission.event([51], 1, finish=FinishReason.LENGTH)]

        async with serve(script, client=RESUMING) as served:
            with pytest.raises(ResourceExhausted):
                await served.client.complete("a", request_id="one")
            assert (await served.client.complete("a", request_id="one")).token_ids == (50, 51)
            for _ in range(2):
                with pytest.raises(RequestFailed, match="broken"):
                    await served.client.complete("a", request_id="two")
            assert len(served.engine.submissions) == 3

    play(main)


def test_a_client_says_plainly_that_it_gave_up(
    serve: Any, pacer: Any, read_tokens: Any, play: Any
) -> None:
    async def main() -> None:
        paced = pacer()
        paced.allow(3)
        async with serve(paced) as served:
            patient = AsyncClient(served.address, reconnect_s=0.5)
            hasty = AsyncClient(served.address, reconnect_s=30.0, timeout=1.0)
            streams = [client.generate("a", request_id="mine") for client in (patient, hasty)]
            for stream in streams:
                await read_tokens(stream, 3)
            served.service.close()
        with pytest.raises(StreamLost, match=r"within 0\.5 s, .*'mine', .* 3 tokens have come"):
            await anext(streams[0])
        with pytest.raises(DeadlineExceeded):
            await anext(streams[1])
        await patient.close()
        await hasty.close()

    play(main)


def test_an_invalid_request_keeps_no_id(serve: Any, say: Any, play: Any) -> None:
    async def main() -> None:
        async with serve(say([50]), client=RESUMING) as served:
            with pytest.raises(InvalidArgument):
                await served.client.complete("a", request_id="mine", top_p=2.0)
            assert (await served.client.complete("a", request_id="mine")).token_ids == (50,)

    play(main)
