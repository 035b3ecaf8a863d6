"""Bytes that no proper client sends: the server answers with a status, and lives."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

import grpc
import pytest

from phalanx.protos.limits import MAX_MESSAGE_BYTES
from phalanx.protos.v1 import serving_pb2, types_pb2

SERVICE = "/phalanx.v1.InferenceService/"
METHODS = (
    "Generate",
    "Chat",
    "Tokenize",
    "Detokenize",
    "Abort",
    "Resume",
    "GetModelInfo",
    "GetClusterState",
)
FINE = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}


async def send(channel: Any, method: str, data: bytes, **options: Any) -> tuple[Any, str]:
    """(status, text) of a call with these bytes as its message."""
    call = channel.unary_stream(SERVICE + method)(data, timeout=10, **options)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def test_random_bytes(serve: Any, say: Any) -> None:
    chance = random.Random(7)

    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            for _ in range(60):
                for method in METHODS:
                    data = chance.randbytes(chance.randrange(64))
                    code, text = await send(channel, method, data)
                    assert code in FINE, (method, data, code, text)
            assert (await served.client.complete("a")).token_ids == (50,)

    asyncio.run(main())


def test_bent_messages(serve: Any, say: Any) -> None:
    """Good requests with bytes changed, cut off, doubled."""
    chance = random.Random(11)
    params = types_pb2.SamplingParams(
        temperature=0.5, top_k=3, logit_bias={5: 1.5}, stop=["x"], stop_token_ids=[7], seed=9
    )
    messages = [types_pb2.ChatMessage(role="user", content="hello")]
    good = {
        "Generate": serving_pb2.GenerateRequest(request_id="r", text="the fox", params=params),
        "Chat": serving_pb2.ChatRequest(request_id="r", messages=messages, params=params),
        "Tokenize": serving_pb2.TokenizeRequest(text="the fox"),
        "Detokenize": serving_pb2.DetokenizeRequest(token_ids=[1, 2, 300]),
    }

    def bend(data: bytes) -> bytes:
        bent = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            where = chance.randrange(len(bent))
            match chance.randrange(4):
                case 0:
                    bent[where] = chance.randrange(256)
                case 1:
                    bent[where] ^= 1 << chance.randrange(8)
                case 2:
                    bent = bent[: where + 1]
                case 3:
                    bent[where:where] = bent[where : where + chance.randrange(8)]
        return bytes(bent)

    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            refused = 0
            for turn in range(100):
                for method, message in good.items():
                    if hasattr(message, "request_id"):
                        message.request_id = f"{method}-{turn}"
                    data = bend(message.SerializeToString())
                    code, text = await send(channel, method, data)
                    assert code in FINE, (method, data, code, text)
                    refused += code is not grpc.StatusCode.OK
            assert refused > 100
            assert (await served.client.complete("a")).token_ids == (50,)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("Generate", b"\x12\x02\xff\xfe"),
        ("Generate", b"\x0a\x01\x80"),
        ("Chat", b"\x12\x05\x0a\x03\xed\xa0\x80"),
        ("Tokenize", b"\x0a\x02\xc3\x28"),
        ("Abort", b"\x0a\x01\xff"),
        ("Generate", b"\x12\xff\xff\xff\xff\x0f"),
    ],
)
def test_bytes_that_are_no_message_are_the_callers_fault(
    serve: Any, say: Any, method: str, data: bytes
) -> None:
    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            code, text = await send(channel, method, data)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "not a message" in text
            assert not served.engine.submissions

    asyncio.run(main())


def test_an_oversize_message_is_refused(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            data = serving_pb2.TokenizeRequest(text="x" * MAX_MESSAGE_BYTES).SerializeToString()
            code, _ = await send(channel, "Tokenize", data)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await served.client.complete("a")).token_ids == (50,)

    asyncio.run(main())


def test_oversize_metadata_is_refused(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            metadata = [("x-large", "y" * 40_000)]
            code, _ = await send(channel, "GetModelInfo", b"", metadata=metadata)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await send(channel, "GetModelInfo", b""))[0] is grpc.StatusCode.OK

    asyncio.run(main())


def test_connections_that_do_not_speak_grpc(serve: Any, say: Any) -> None:
    chance = random.Random(3)
    hellos = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", chance.randbytes(4096), b""]

    async def main() -> None:
        async with serve(say([50])) as served:
            host, _, port = served.address.rpartition(":")
            sockets = [socket.create_connection((host, int(port)), 5) for _ in range(40)]
            for index, item in enumerate(sockets):
                item.sendall(hellos[index % len(hellos)])
            assert (await served.client.complete("a")).token_ids == (50,)
            for item in sockets:
                item.close()
            assert (await served.client.complete("a")).token_ids == (50,)

    asyncio.run(main())


def test_many_streams_at_once_on_one_connection(serve: Any, say: Any, words: list[int]) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            answers = await asyncio.gather(
                *(served.client.complete("a", request_id=f"r{index}") for index in range(100))
            )
            assert all(list(answer.token_ids) == words for answer in answers)
            assert len({answer.seed for answer in answers}) == 100

    asyncio.run(main())
