"""The Python clients: what they accept, collect, raise and repeat."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from phalanx.controller.client import AsyncClient, Client
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidArgument,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.protos.sampling import Grammar

WORDS = "the quick brown fox jumps over the lazy dog while forty-two geese say hello to the world"


async def in_thread(served: Any, work: Any, **options: Any) -> Any:
    """Run `work(client)` with a blocking client of the server."""

    def run() -> Any:
        with Client(served.address, **options) as client:
            return work(client)

    return await asyncio.to_thread(run)


def test_the_blocking_client_does_it_all(serve: Any, say: Any, words: list[int]) -> None:
    def work(client: Client) -> None:
        assert not client.healthy()
        with pytest.raises(DeadlineExceeded, match="not ready within"):
            client.wait_ready(0.15)
        answer = client.complete("the fox", n=2, seed=3)
        assert [sample.text for sample in answer.samples] == [WORDS, WORDS]
        assert answer.usage.completion_tokens == 2 * len(words)
        assert client.ask("hi").text == WORDS
        assert client.ask([{"role": "user", "content": "hi"}]).finish_reason == "length"
        pieces = [item.samples[0].text for item in client.generate([4, 5])]
        assert "".join(pieces) == WORDS
        assert client.detokenize(client.tokenize(WORDS)) == WORDS
        assert client.model_info().name == "tiny"
        assert client.cluster_state().queued_requests == 2

    async def main() -> None:
        async with serve(say(words)) as served:
            await in_thread(served, work)
            served.host.set_serving(True)
            await in_thread(served, lambda client: client.wait_ready(5))

    asyncio.run(main())


def test_leaving_a_blocking_stream_cancels_it(serve: Any, eventually: Any) -> None:
    async def endless(submission: Any) -> AsyncIterator[list[TokenEvent]]:
        first = 0
        while True:
            yield [submission.event([50], first)]
            first += 1
            await asyncio.sleep(0.002)

    def work(client: Client) -> None:
        for _ in client.generate("a"):
            break

    async def main() -> None:
        async with serve(endless) as served:
            await in_thread(served, work)
            await asyncio.wait_for(served.engine.submissions[0].closed.wait(), 5)

    asyncio.run(main())


def test_one_blocking_client_serves_many_threads(serve: Any, say: Any, words: list[int]) -> None:
    def work(client: Client) -> list[str]:
        texts: list[str] = []
        threads = [
            threading.Thread(target=lambda: texts.append(client.complete("a").text))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return texts

    async def main() -> None:
        async with serve(say(words)) as served:
            assert await in_thread(served, work) == [WORDS] * 8

    asyncio.run(main())


def test_wrong_parameters_never_leave(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            client = served.client
            with pytest.raises(TypeError, match="temprature: .* did you mean temperature"):
                client.generate("a", temprature=1.0)
            with pytest.raises(TypeError, match="xyz: no such sampling parameter; allowed: max_"):
                client.chat("a", xyz=1)
            with pytest.raises(InvalidArgument) as caught:
                client.generate("a", top_k=-1, temperature="hot", seed=2**64, n=1)
            fields = {violation.field for violation in caught.value.violations}
            assert fields == {"params.top_k", "params.temperature", "params.seed"}
            with pytest.raises(InvalidArgument, match="token_ids"):
                client.generate([1, -1])
            with pytest.raises(InvalidArgument, match="token_ids"):
                client.generate(None)
            with pytest.raises(InvalidArgument, match=r"messages\[0\]"):
                client.chat([{"role": "user", "text": "x"}])
            assert not served.books.started

    asyncio.run(main())


def test_lone_texts_and_none(serve: Any, say: Any, words: list[int]) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            answer = await served.client.complete("a", stop="fox", top_k=None, bad_words="dog")
            assert answer.stop_reason == "fox"
            params = served.engine.submissions[0].params
            assert (params.stop, params.top_k) == (("fox",), 0)
            assert len(params.bad_words_ids) == 2

    asyncio.run(main())


def test_refused_requests_are_repeated_only_when_asked(serve: Any) -> None:
    refusals = [0]

    async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
        refusals[0] += 1
        if refusals[0] % 3:
            raise ResourceExhausted("full", 0.01)
        yield [submission.event([50], finish=FinishReason.LENGTH)]

    async def main() -> None:
        async with serve(script) as served:
            with pytest.raises(ResourceExhausted) as caught:
                await served.client.complete("a")
            assert caught.value.retry_after_s == 0.01
            assert refusals == [1]
            async with AsyncClient(served.address, retries=2) as client:
                assert (await client.complete("a")).token_ids == (50,)
                assert refusals == [3]
                assert (await client.complete("a")).token_ids == (50,)
            answer = await in_thread(served, lambda client: client.complete("a"), retries=2)
            assert answer.token_ids == (50,)
            assert refusals == [9]

    asyncio.run(main())


def test_a_begun_stream_is_never_repeated(serve: Any) -> None:
    async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
        yield [submission.event([50])]
        await asyncio.sleep(0.05)
        raise ResourceExhausted("full", 0.01)

    async def main() -> None:
        async with serve(script) as served, AsyncClient(served.address, retries=5) as client:
            with pytest.raises(ResourceExhausted):
                await client.complete("a")
            assert len(served.engine.submissions) == 1

    asyncio.run(main())


def test_nobody_there() -> None:
    async def main() -> None:
        async with AsyncClient("127.0.0.1:1", timeout=5) as client:
            assert not await client.healthy()
            with pytest.raises(Unavailable):
                await client.model_info()
            with pytest.raises(DeadlineExceeded):
                await client.wait_ready(0.2)
        with Client("127.0.0.1:1", timeout=5) as blocking:
            assert not blocking.healthy()
            with pytest.raises(PhalanxError):
                blocking.complete("a")

    asyncio.run(main())


@pytest.mark.parametrize("token", ["", "a b", "line\n", "naïve"])
def test_a_token_that_cannot_travel_is_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="token"):
        Client("127.0.0.1:1", token=token)


@pytest.mark.parametrize(
    ("grammar", "expected"),
    [
        ({"json_schema": {"type": "null"}}, Grammar("json_schema", '{"type": "null"}')),
        ({"json_schema": '{"type":"null"}'}, Grammar("json_schema", '{"type":"null"}')),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"choice": ["a", "b"]}, Grammar("choice", '["a", "b"]')),
        ({"lark": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ],
)
def test_the_form_of_an_answer(
    serve: Any, say: Any, grammar: dict[str, Any], expected: Grammar
) -> None:
    async def main() -> None:
        async with serve(say([60])) as served, AsyncClient(served.address) as client:
            await client.complete("a", grammar=grammar, max_tokens=2)
            assert served.engine.submissions[0].params.grammar == expected
            for wrong in ({}, {"regex": "a", "lark": "b"}, {"xml": "a"}, "a+", {"regex": 5}):
                with pytest.raises(InvalidArgument, match="grammar"):
                    await client.complete("a", grammar=wrong)

    asyncio.run(main())
