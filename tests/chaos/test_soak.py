"""Long runs: traces of right requests that are cancelled and preempted (33), and a soak (37)."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.harms import HARMS
from harness.history import Answer, Fault, Record, judge
from harness.load import Ask, read
from harness.running import idle
from harness.scenarios import MANY, PRESSED, SHM, Harm
from harness.server import Server

from phalanx.controller.client import AsyncClient

MIB = 2**20
EVERY_S = 5.0
WARM = 0.25
"""Part of a soak whose samples are not looked at."""
GROWTH = 1.0
"""MiB a minute that a process may seem to grow."""
KILL_S = 300.0


async def some(
    client: AsyncClient, asks: Sequence[Ask], draw: random.Random, name: str, leaving: float
) -> list[Record]:
    """64 requests at times of their own; a part of the readers leaves at a time of theirs."""

    async def one(number: int) -> Record:
        await asyncio.sleep(draw.uniform(0, 2))
        ask = draw.choice(asks)
        record = Record(ask.number, ask.samples)
        task = asyncio.create_task(read(client, ask, record, f"{name}-{number}"))
        if draw.random() < leaving:
            await asyncio.wait([task], timeout=draw.uniform(0, 1.5))
            record.left = not task.done()
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return record

    return list(await asyncio.gather(*(one(number) for number in range(64))))


async def traces(
    server: Server, known: tuple[list[Ask], dict[int, Answer]], seed: int, minutes: float, name: str
) -> tuple[int, list[Fault]]:
    asks, reference = known
    draw, ends, count = random.Random(seed), time.monotonic() + 60 * minutes, 0
    async with AsyncClient(server.address, timeout=300) as client:
        while True:
            records = await some(client, asks, draw, f"{name}-{count}", 0.3)
            faults = judge(records, reference, await idle(client))
            count += len(records)
            if faults or time.monotonic() > ends:
                return count, faults


@pytest.fixture(scope="session")
def minutes(pytestconfig: pytest.Config) -> float:
    return float(pytestconfig.getoption("--soak-minutes", 3.0))


@pytest.mark.bar(33)
@pytest.mark.chaos
@pytest.mark.timeout(10 * 3600)
def test_answers_do_not_depend_on_the_company(
    clusters: Any, seed: int, minutes: float, report: Any
) -> None:
    """Shared prefixes, cancelled readers, a quarter of the KV pool that all would want."""
    known = clusters.reference(SHM, MANY)
    server = clusters.get(PRESSED)
    count, faults = asyncio.run(traces(server, known, seed, minutes, clusters.name()))
    report.note(33, "traces", requests=count, minutes=minutes, seed=seed)
    assert faults == []


def anonymous(process: psutil.Process) -> float:
    """MiB of memory that is the process's own, in RAM or swapped out."""
    found = {"RssAnon": 0, "VmSwap": 0}
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0])
    return sum(found.values()) / 1024


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Theil and Sen's: the median of the slopes between all pairs, per minute."""
    slopes = sorted(
        (b[1] - a[1]) / (b[0] - a[0]) * 60
        for index, a in enumerate(samples)
        for b in samples[index + 1 :]
        if b[0] > a[0]
    )
    return slopes[len(slopes) // 2] if slopes else 0.0


async def soak(
    server: Server, known: tuple[list[Ask], dict[int, Answer]], seed: int, minutes: float, name: str
) -> tuple[int, list[Fault], dict[str, float]]:
    asks, reference = known
    draw, count = random.Random(seed), 0
    began, killed = time.monotonic(), time.monotonic()
    ends, faults = began + 60 * minutes, list[Fault]()
    samples: dict[str, list[tuple[float, float]]] = {}
    controller = psutil.Process(server.pid)

    async def watch() -> None:
        while True:
            now = time.monotonic() - began
            samples.setdefault("controller MiB", []).append((now, anonymous(controller)))
            samples.setdefault("controller files", []).append((now, controller.num_fds()))
            samples.setdefault("controller threads", []).append((now, controller.num_threads()))
            journal = sum(path.stat().st_size for path in server.points.parent.glob("journal/*"))
            samples.setdefault("journal MiB", []).append((now, journal / MIB))
            await asyncio.sleep(EVERY_S)

    async with AsyncClient(server.address, timeout=300) as client:
        watching = asyncio.create_task(watch())
        while not faults and time.monotonic() < ends:
            running = asyncio.create_task(some(client, asks, draw, f"{name}-{count}", 0.05))
            if time.monotonic() > killed + min(KILL_S, 30 * minutes):
                await asyncio.sleep(1.0)
                await HARMS["kill"](server, Harm("kill", rank=draw.randrange(2)))
                killed = time.monotonic()
            records = await running
            faults = judge(records, reference, await idle(client))
            count += len(records)
        watching.cancel()
    warm = WARM * 60 * minutes
    return count, faults, {key: slope([s for s in v if s[0] > warm]) for key, v in samples.items()}


@pytest.mark.bar(37)
@pytest.mark.chaos
@pytest.mark.timeout(10 * 3600)
def test_a_long_run_loses_and_leaks_nothing(
    clusters: Any, seed: int, minutes: float, report: Any
) -> None:
    """A twentieth of the readers leaves; a rank dies now and then. Short runs say little of slopes:
    caches are still filling."""
    known = clusters.reference(SHM, MANY)
    clusters.close()
    server = clusters.get(SHM)
    count, faults, slopes = asyncio.run(soak(server, known, seed, minutes, clusters.name()))
    shown = {f"{key} a minute": round(value, 2) for key, value in slopes.items()}
    report.note(37, "soak", minutes=minutes, requests=count, seed=seed, **shown)
    assert faults == []
    if minutes >= 30:
        assert slopes["controller MiB"] < GROWTH
        assert abs(slopes["controller files"]) < 1 and abs(slopes["controller threads"]) < 1
