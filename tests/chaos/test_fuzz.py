"""Test 32: whatever stands in a message, it gets an answer or a refusal, and nobody else notices."""

from __future__ import annotations

import asyncio
import collections
import itertools
import random
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from harness.scenarios import SHM, Load

from phalanx.controller.client import AsyncClient
from phalanx.protos.limits import MAX_MESSAGE_BYTES
from phalanx.protos.v1 import serving_pb2, types_pb2

METHOD = "/phalanx.v1.InferenceService/Generate"
ALLOWED = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
LOAD = Load(8, 48)
FLOATS = (-1.0, -1e-9, 0.0, 1e-30, 1.0, 1e9, float("nan"), float("inf"), float("-inf"), -3.5)
INTEGERS = (0, 1, 2, 7, 2**31 - 1, 2**31, 2**32 - 1)
TEXTS = ("", "a", "\0", "é" * 40, "x" * 100_000, "[" * 3000, "(a+)+b", '{"$ref": "#"}', "\u2028")


def values(field: FieldDescriptor) -> list[Any]:
    """What to put into a field: the edges of its type, and of what it may mean."""
    kind = field.cpp_type
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return list(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_UINT32:
        return list(INTEGERS)
    if kind == FieldDescriptor.CPPTYPE_UINT64:
        return [*INTEGERS, 2**63 - 1, 2**63, 2**64 - 1]
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return [True]
    return list(TEXTS)


def settings() -> list[tuple[str, Any]]:
    """(field of the parameters, value), each alone."""
    found: list[tuple[str, Any]] = []
    for field in types_pb2.SamplingParams.DESCRIPTOR.fields:
        if field.name == "logit_bias":
            found += [(field.name, {index: value}) for index in (0, 400, 2**31) for value in FLOATS]
            found.append((field.name, {index: 1.0 for index in range(301)}))
        elif field.name == "grammar":
            for inner in types_pb2.Grammar.DESCRIPTOR.fields:
                if inner.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                    found += [(field.name, {inner.name: value}) for value in TEXTS]
        elif field.is_repeated:
            found += [(field.name, [value]) for value in values(field)]
            found.append((field.name, values(field)[:1] * 500))
        else:
            found += [(field.name, value) for value in values(field)]
    return found


def request(*pairs: tuple[str, Any]) -> serving_pb2.GenerateRequest:
    """A request that is right but for these; answers are short."""
    message = serving_pb2.GenerateRequest()
    message.token_ids.ids.extend([5, 6, 7])
    params = message.params
    params.max_tokens = 2
    for name, value in pairs:
        if name == "logit_bias":
            params.logit_bias.update(value)
        elif name == "grammar":
            for key, text in value.items():
                setattr(params.grammar, key, text)
        elif isinstance(value, list):
            getattr(params, name).extend(value)
        else:
            setattr(params, name, value)
    return message


def odd(draw: random.Random) -> Iterator[bytes]:
    """Bytes that are no request of ours, or hardly."""
    plain = request().SerializeToString()
    yield b""
    yield plain + b"\xf8\x7f\x01"  # an unknown field
    yield b"\x0a\x04\xff\xfe\xfd\xfc" + plain  # a request_id that is not UTF-8
    yield b"\x12\x03\xff\xfe\xfd"  # such a text
    yield b"\x22\x05\x1d" + struct.pack("<f", float("nan"))
    yield plain[:-1]
    for index in (-1, 2**31 - 1, 515, 10**9):
        other = serving_pb2.GenerateRequest()
        other.token_ids.ids.extend([index & 0xFFFFFFFF])
        yield other.SerializeToString()
    yield serving_pb2.GenerateRequest(text="a" * (MAX_MESSAGE_BYTES // 2)).SerializeToString()
    for _ in range(20):
        bent = bytearray(plain)
        for _ in range(draw.randrange(1, 4)):
            bent[draw.randrange(len(bent))] = draw.randrange(256)
        yield bytes(bent)


def cases(count: int, draw: random.Random) -> list[bytes]:
    """Each setting alone, the odd ones, then pairs of settings."""
    single = settings()
    found: list[Message] = [request(item) for item in single]
    pairs = [pair for pair in itertools.combinations(single, 2) if pair[0][0] != pair[1][0]]
    draw.shuffle(pairs)
    found += [request(*pair) for pair in pairs]
    encoded = [message.SerializeToString() for message in found[:count]]
    return [*encoded, *odd(draw)]


async def send(channel: Any, body: bytes, gate: asyncio.Semaphore) -> grpc.StatusCode:
    async with gate:
        call = channel.unary_stream(METHOD)(body, timeout=120)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def storm(server: Any, bodies: list[bytes]) -> collections.Counter[grpc.StatusCode]:
    """Everything is sent while a stream runs, again and again, whose tokens must not change."""
    gate = asyncio.Semaphore(24)
    ask = {"max_tokens": 60, "ignore_eos": True, "temperature": 0.9, "seed": 3}
    async with AsyncClient(server.address, timeout=600) as client:
        expected = (await client.complete([5, 17, 300], **ask)).token_ids
        over = asyncio.Event()

        async def watch() -> int:
            count = 0
            while not over.is_set():
                assert (await client.complete([5, 17, 300], **ask)).token_ids == expected
                count += 1
            return count

        watching = asyncio.create_task(watch())
        async with grpc.aio.insecure_channel(server.address) as channel:
            codes = await asyncio.gather(*(send(channel, body, gate) for body in bodies))
        over.set()
        assert await watching > 0
        assert [replica.state for replica in (await client.cluster_state()).replicas] == ["ready"]
    wrong = [
        (code.name, body[:80])
        for code, body in zip(codes, bodies, strict=True)
        if code not in ALLOWED
    ]
    assert wrong == []
    return collections.Counter(codes)


@pytest.mark.bar(32)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.chaos)])
def test_no_message_hurts_anybody(clusters: Any, seed: int, count: int, report: Any) -> None:
    server = clusters.get(SHM)
    line = len(server.said)
    codes = asyncio.run(storm(server, cases(count, random.Random(seed))))
    assert codes[grpc.StatusCode.OK] and codes[grpc.StatusCode.INVALID_ARGUMENT]
    assert not [text for _, text in server.said[line:] if "replica-" in text]
    report.note(32, "fuzzed messages", **{code.name: number for code, number in codes.items()})
