"""More than can be done is asked for: tests 21 and 22."""

from __future__ import annotations

import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from harness.running import idle, percentile
from harness.server import Topology

from phalanx.controller.client import AsyncClient
from phalanx.protos.errors import PhalanxError, ResourceExhausted

TOPOLOGY = Topology(flags=("--max-running", "16", "--max-queued", "16"), journal=False)
TOKENS = 120
ASK: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.0}
PEAK_S = 4.0
REFUSED_STREAM = "RST_STREAM with error code 7"
QUIET = 2.0
"""Load of the machine up to which rates say anything."""


@dataclass
class Tally:
    """What became of requests."""

    done: int = 0
    wrong: list[str] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    """Seconds to wait, by refusals."""
    dropped: int = 0
    """Refused by gRPC itself, without a time to wait."""
    last: float = 0.0


async def one(client: AsyncClient, number: int, expected: tuple[int, ...], tally: Tally) -> bool:
    """A request; whether it was taken."""
    began = time.monotonic()
    try:
        tokens = (await client.complete([5, 6, 7], **ASK)).token_ids
    except ResourceExhausted as error:
        tally.refused_s.append(time.monotonic() - began)
        tally.told.append(error.retry_after_s)
        return False
    except PhalanxError as error:
        if REFUSED_STREAM in str(error):
            tally.dropped += 1
            return False
        tally.wrong.append(repr(error))
        return True
    if tokens != expected:
        tally.wrong.append(f"{number}: {tokens}")
    tally.done += 1
    tally.last = time.monotonic()
    return True


async def peak(client: AsyncClient, expected: tuple[int, ...]) -> float:
    """Requests a second with as many open as are computed together."""
    tally, ends = Tally(), time.monotonic() + PEAK_S

    async def again(number: int) -> None:
        while time.monotonic() < ends:
            await one(client, number, expected, tally)

    await asyncio.gather(*(again(number) for number in range(24)))
    assert not tally.wrong
    return tally.done / PEAK_S


async def overload(
    server: Any, seconds: float, times: float, retries: int, draw: random.Random
) -> Any:
    """Poisson arrivals at some times the peak; after a refusal, so many tries more at once."""
    async with AsyncClient(server.address, timeout=300, reconnect_s=0) as client:
        expected = (await client.complete([5, 6, 7], **ASK)).token_ids
        best, tally, tasks = await peak(client, expected), Tally(), []
        process = psutil.Process(server.pid)
        before = process.memory_info().rss

        async def arrive(number: int) -> None:
            for _ in range(1 + retries):
                if await one(client, number, expected, tally):
                    return

        began = due = time.monotonic()
        while due < began + seconds:
            due += draw.expovariate(times * best)
            await asyncio.sleep(max(due - time.monotonic(), 0))
            tasks.append(asyncio.create_task(arrive(len(tasks))))
        await asyncio.gather(*tasks)
        goodput = tally.done / (tally.last - began)
        grown = process.memory_info().rss - before
        calm = Tally()
        remains = await idle(client)
        await one(client, 0, expected, calm)
        assert calm.done == 1 and remains.blocks_free == remains.blocks_total
        return best, goodput, grown, tally


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("seconds", "times", "retries"),
    [
        pytest.param(5, 4, 0, marks=pytest.mark.bar(21), id="gate"),
        pytest.param(60, 10, 0, marks=[pytest.mark.bar(21), pytest.mark.chaos], id="minute"),
        pytest.param(30, 5, 3, marks=[pytest.mark.bar(22), pytest.mark.chaos], id="storm"),
    ],
)
def test_what_is_taken_is_done_and_the_rest_is_told_when_to_come(
    clusters: Any, seed: int, seconds: float, times: float, retries: int, report: Any
) -> None:
    best, goodput, grown, tally = asyncio.run(
        overload(clusters.get(TOPOLOGY), seconds, times, retries, random.Random(seed))
    )
    report.note(
        22 if retries else 21,
        "overload",
        seconds=seconds,
        peak_per_s=round(best, 1),
        goodput_per_s=round(goodput, 1),
        done=tally.done,
        refused=len(tally.refused_s),
        refused_by_grpc=tally.dropped,
        times_the_peak=times,
        load_of_the_machine=round(os.getloadavg()[0], 1),
        refused_p99_ms=round(1000 * percentile(tally.refused_s, 99)),
        grown_MiB=round(grown / 2**20),
    )
    assert tally.wrong == []
    assert tally.refused_s and all(wait > 0 for wait in tally.told)
    assert grown < 256 * 2**20
    if os.getloadavg()[0] <= QUIET:
        assert tally.dropped == 0
        assert goodput >= (0.8 if retries else 0.9) * best
