"""Callers that leave or do not read, and a server that stops."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from phalanx.protos.steps import SampledToken, TokenLogprob

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


def port_of(made: Any) -> int:
    return int(made.host.url.rpartition(":")[2].partition("/")[0])


async def post(made: Any, body: dict[str, Any]) -> tuple[Any, Any]:
    """A connection of our own, on which a chat was asked for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(made))
    data = json.dumps(body).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("speaks", [False, True])
def test_a_caller_that_leaves_frees_the_request(
    front: Any, endless: Any, eventually: Any, stream: bool, speaks: bool
) -> None:
    async def silent(submission: Any) -> Any:
        await asyncio.sleep(3600)
        yield []

    async def main() -> None:
        async with front(endless if speaks else silent) as made:
            reader, writer = await post(made, CHAT | {"stream": stream})
            await eventually(lambda: made.submissions)
            if stream and speaks:
                await reader.readuntil(b"data: ")
            writer.close()
            await asyncio.wait_for(made.submissions[0].closed.wait(), 10)
            await eventually(lambda: made.served.books.ended)
            assert made.served.books.ended[0][0] == "cancelled"
            assert made.served.engine.live == {}

    asyncio.run(main())


def test_closing_the_clients_stream_frees_the_request(
    front: Any, endless: Any, eventually: Any
) -> None:
    async def main() -> None:
        async with front(endless) as made:
            stream = await made.client.chat.completions.create(**CHAT, stream=True)
            await anext(aiter(stream))
            await stream.close()
            await asyncio.wait_for(made.submissions[0].closed.wait(), 10)

    asyncio.run(main())


def test_leaving_frees_all_prompts(front: Any, endless: Any, eventually: Any) -> None:
    async def main() -> None:
        async with front(endless) as made:
            stream = await made.client.completions.create(
                model="tiny", prompt=["a", "b", "c"], stream=True
            )
            await eventually(lambda: len(made.submissions) == 3)
            await stream.close()
            for submission in made.submissions:
                await asyncio.wait_for(submission.closed.wait(), 10)

    asyncio.run(main())


def test_a_caller_that_does_not_read(front: Any, eventually: Any) -> None:
    top = [TokenLogprob(token_id=t, logprob=-1.0, rank=t + 1) for t in range(20)]
    token = SampledToken(seq=0, token_id=50, logprob=top[0], top=top)

    async def script(submission: Any) -> Any:
        for first in range(0, 10**9, 20):
            yield [submission.event([token] * 20, first)]
            await asyncio.sleep(0.001)

    async def main() -> None:
        async with front(script, service={"max_stall_s": 0.3}) as made:
            body = CHAT | {"stream": True, "logprobs": True, "top_logprobs": 20}
            _, writer = await post(made, body)
            await eventually(lambda: made.submissions)
            await asyncio.wait_for(made.submissions[0].closed.wait(), 20)
            await eventually(lambda: made.served.books.ended)
            assert made.served.books.ended[0][0] == "resource_exhausted"
            writer.close()

    asyncio.run(main())


PART = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer secret\r\n"
)


@pytest.mark.parametrize(
    "data",
    [
        b"secret\r\n\r\n",
        PART + b"X: " + b"secret" * 5000 + b"\r\n\r\n",
        PART + b"Transfer-Encoding: chunked\r\n\r\nsecret\r\n",
        PART + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        PART + b"Content-Length: 100\r\n\r\n{",
    ],
)
def test_broken_and_unfinished_requests_hurt_nobody(
    front: Any, say: Any, data: bytes, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """And nothing of them is logged."""

    async def main() -> None:
        async with front(say([50])) as made:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(made))
            writer.write(data)
            await writer.drain()
            if not data.endswith(b"{"):
                assert b" 400 " in await asyncio.wait_for(reader.readline(), 10)
            await made.client.chat.completions.create(**CHAT)
            writer.close()
            assert len(made.submissions) == 1

    asyncio.run(main())
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_a_stop_lets_requests_finish_and_ends_the_rest(
    front: Any, say: Any, words: list[int], endless: Any, eventually: Any
) -> None:
    async def main() -> None:
        go_on = asyncio.Event()
        async with front(say(words, pause=go_on.wait)) as made:
            asking = asyncio.ensure_future(made.client.chat.completions.create(**CHAT))
            await eventually(lambda: made.submissions)
            stopping = asyncio.ensure_future(made.host.stop(10.0))
            await asyncio.sleep(0)
            with pytest.raises(openai.InternalServerError):
                await made.client.chat.completions.create(**CHAT)
            go_on.set()
            assert (await asking).choices[0].finish_reason == "length"
            await stopping
        async with front(endless) as made:
            stream = await made.client.chat.completions.create(**CHAT, stream=True)
            await anext(aiter(stream))
            stopping = asyncio.ensure_future(made.host.stop(0.05))
            with pytest.raises(openai.APIError, match="shutting down"):
                async for _ in stream:
                    pass
            await stopping

    asyncio.run(main())
