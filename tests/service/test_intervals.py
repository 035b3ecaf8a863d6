"""Whoever asks for fewer messages gets fewer, with the same tokens, and never waits for an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.errors import InvalidArgument, ResourceExhausted

LONGEST_S = 10.0
"""No silence of this length ends within a test: what comes earlier has not waited for it."""


async def read(stream: Any) -> list[list[int]]:
    """The tokens of each message."""
    return [
        [token for sample in message.samples for token in sample.token_ids]
        async for message in stream
    ]


@pytest.mark.parametrize("name", ["", "mine"])
def test_between_the_first_token_and_the_end_nothing_is_sent_early(
    serve: Any, say: Any, words: list[int], name: str
) -> None:
    async def main() -> None:
        async with (
            serve(say(words, pause=lambda: asyncio.sleep(0.002))) as served,
            asyncio.timeout(8),
        ):
            asked = {"request_id": name, "stream_interval_s": LONGEST_S}
            first, rest = await read(served.client.generate("the", **asked))
            assert first == words[:1]
            assert rest == words[1:]
            found = await read(served.client.generate("the", request_id=name and "other"))
            assert [token for message in found for token in message] == words
            assert len(found) > 2

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "mine"])
def test_an_interval_that_is_over_brings_what_has_come(serve: Any, name: str) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def script(submission: Any) -> AsyncIterator[Any]:
            for index in range(4):
                yield [submission.event([50 + index], index)]
                await asyncio.sleep(0)
            await go_on.wait()
            yield [submission.event([60], 4, finish=FinishReason.LENGTH)]

        async with serve(script) as served, asyncio.timeout(20):
            seen: list[int] = []
            asked = {"request_id": name, "stream_interval_s": 0.05}
            async for message in served.client.generate("the", **asked):
                seen += [token for sample in message.samples for token in sample.token_ids]
                if seen == [50, 51, 52, 53]:
                    go_on.set()  # the end is not what has brought them
            assert seen == [50, 51, 52, 53, 60]

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "mine"])
def test_an_error_does_not_wait(serve: Any, name: str) -> None:
    async def script(submission: Any) -> AsyncIterator[Any]:
        for index in range(3):
            yield [submission.event([50 + index], index)]
            await asyncio.sleep(0.002)
        raise ResourceExhausted("no more", 1.0)

    async def main() -> None:
        async with serve(script) as served, asyncio.timeout(8):
            seen: list[int] = []
            with pytest.raises(ResourceExhausted, match="no more"):
                async for message in served.client.generate(
                    "the", request_id=name, stream_interval_s=LONGEST_S
                ):
                    seen += [token for sample in message.samples for token in sample.token_ids]
            assert seen == [50, 51, 52]

    asyncio.run(main())


@pytest.mark.parametrize("wrong", [-0.5, 10.5, float("nan"), float("inf")])
def test_an_interval_out_of_range_is_named(serve: Any, say: Any, wrong: float) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            with pytest.raises(InvalidArgument, match="options.stream_interval_s"):
                await served.client.complete("the", stream_interval_s=wrong)

    asyncio.run(main())
