"""Clients that leave, come back, and ask twice: tests 27, 29 and 30."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from typing import Any

import psutil
import pytest
from harness.history import Answer
from harness.load import Ask, begin
from harness.running import idle
from harness.scenarios import SHM, Load
from harness.server import Server
from harness.wires import Wire

from phalanx.controller.client import AsyncClient
from phalanx.protos.errors import AlreadyExists, NotFound
from phalanx.protos.v1 import serving_pb2

LOAD = Load(8, 48)
LONG = {"max_tokens": 150, "ignore_eos": True, "temperature": 0.0}


async def leave(address: str, how: str, after: float, number: int) -> None:
    """Begin a stream without an id, and be gone after so many seconds."""
    async with contextlib.AsyncExitStack() as stack:
        wire = None
        if how != "cancel":
            wire = await stack.enter_async_context(Wire(address))
            address = wire.address
        client = await stack.enter_async_context(AsyncClient(address, reconnect_s=0, timeout=60))
        prompt = [5 + (number * 7 + place) % 400 for place in range(1 + number % 80)]

        async def read() -> None:
            with contextlib.suppress(Exception):
                async for _ in client.generate(prompt, **LONG):
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(after)
        if wire is not None and how == "half-close":
            wire.half_close()
        elif wire is not None:
            wire.reset()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def leave_all(server: Server, count: int, draw: random.Random) -> dict[str, float]:
    controller = psutil.Process(server.pid)
    async with AsyncClient(server.address) as client:
        # as many before as it takes for pools of threads and connections to be as large as they get
        await asyncio.gather(*(leave(server.address, "cancel", 0.3, n) for n in range(32)))
        await idle(client)
        await asyncio.sleep(1.0)
        base = controller.num_fds(), controller.num_threads()
        for first in range(0, count, 50):
            await asyncio.gather(
                *(
                    leave(
                        server.address,
                        ("cancel", "reset", "half-close")[number % 3],
                        draw.choice((0.0, draw.uniform(0, 0.1), draw.uniform(0, 1.5))),
                        number,
                    )
                    for number in range(first, min(first + 50, count))
                )
            )
        began = time.monotonic()
        remains = await idle(client)
        seconds = time.monotonic() - began
        assert remains.blocks_free == remains.blocks_total
        state = await client.cluster_state()
        assert state.replicas[0].running_requests == state.replicas[0].waiting_requests == 0
        ends = time.monotonic() + 10
        while (left := (controller.num_fds(), controller.num_threads())) > base:
            assert time.monotonic() < ends, (base, left)
            await asyncio.sleep(0.1)
        return {"clients": count, "seconds until all blocks were free": round(seconds, 2)}


@pytest.mark.bar(27)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.chaos)])
def test_clients_that_vanish_leave_nothing_behind(
    clusters: Any, seed: int, count: int, report: Any
) -> None:
    """Cancelled, reset and half-closed, in the queue, in prefill and in the midst."""
    figures = asyncio.run(leave_all(clusters.get(SHM), count, random.Random(seed)))
    report.note(27, "vanished clients", **figures)


async def resume(
    client: AsyncClient, request_id: str, starts: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Tokens of each sample from its start on."""
    request = serving_pb2.ResumeRequest(request_id=request_id, next_index=starts)
    found: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(starts)), ())
    async for message in client._stub.Resume(request, timeout=60, metadata=client._metadata):
        for sample in message.samples:
            if sample.token_ids:
                due = starts[sample.index] + len(found[sample.index])
                assert sample.first_token_index == due
                found[sample.index] += tuple(sample.token_ids)
    return found


async def resume_all(
    server: Server, asks: Sequence[Ask], reference: dict[int, Answer], cases: int, name: str
) -> None:
    """Every index of every request, while it runs and after it; two readers at a time."""
    draw = random.Random(cases)
    async with AsyncClient(server.address, timeout=120) as client:
        reading = begin(client, asks, name)
        await reading.reach(len(asks))
        done = 0
        while done < cases:
            batch = []
            for _ in range(16):
                ask = draw.choice(asks)
                answer = reference[ask.number]
                starts = [draw.randint(0, len(answer[i][0])) for i in range(ask.samples)]
                batch += [(ask, starts)] * 2
            async with asyncio.timeout(120):
                found = await asyncio.gather(
                    *(resume(client, f"{name}-{ask.number}", starts) for ask, starts in batch)
                )
            for (ask, starts), rest in zip(batch, found, strict=True):
                for index, start in enumerate(starts):
                    assert rest[index] == reference[ask.number][index][0][start:]
            done += len(batch)
        await reading.finish()
        with pytest.raises(NotFound):
            await client.abort("nobodys")


@pytest.mark.bar(29)
@pytest.mark.parametrize("cases", [128, pytest.param(500, marks=pytest.mark.chaos)])
def test_streams_are_resumed_from_every_index_by_two_at_once(clusters: Any, cases: int) -> None:
    asks, reference = clusters.reference(SHM, LOAD)
    asyncio.run(resume_all(clusters.get(SHM), asks, reference, cases, clusters.name()))


async def ask_in_pairs(server: Server, pairs: int, name: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(server.address, timeout=120))
            for _ in range(2)
        ]
        for first in range(0, pairs, 25):
            numbers = range(first, min(first + 25, pairs))
            answers = await asyncio.gather(
                *(
                    client.complete(
                        [5, 6, number], request_id=f"{name}-{number}", max_tokens=8, ignore_eos=True
                    )
                    for number in numbers
                    for client in clients
                )
            )
            for one, other in zip(answers[::2], answers[1::2], strict=True):
                # the seed is drawn: two runs would differ
                assert one.token_ids == other.token_ids
                assert one.seed == other.seed
                assert len(one.token_ids) == 8
            for number in numbers:
                with pytest.raises(AlreadyExists):
                    await clients[1].complete([7], request_id=f"{name}-{number}", max_tokens=8)


@pytest.mark.bar(30)
@pytest.mark.parametrize("pairs", [50, pytest.param(100, marks=pytest.mark.chaos)])
def test_an_id_that_is_sent_twice_at_once_runs_once(clusters: Any, pairs: int) -> None:
    """Random requests whose seeds the server draws: two runs of one would give two answers."""
    asyncio.run(ask_in_pairs(clusters.get(SHM), pairs, clusters.name()))
