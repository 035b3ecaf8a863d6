"""Two nodes and the cable between them: tests 10, 16, 17 and 18."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from harness import nodes
from harness.history import judge
from harness.line import Line, Tally, carry
from harness.load import begin, keep_asking
from harness.nodes import TwoNodes
from harness.running import LOST, Outcome, idle
from harness.scenarios import Load
from harness.server import Topology

from phalanx.controller.client import AsyncClient

LOAD = Load(16, 48)
TOPOLOGY = Topology(flags=("--collectives", "gloo", "--start-timeout-s", "20"))
CUT_S = 8.0
BAD_S = 60.0
LOSSES = 3
BUSY = 2.0
"""Load for each core from which on times say nothing."""
PAUSE_S = 20.0


@pytest.fixture(scope="module")
def _two_nodes(clusters: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    if why := nodes.permitted():
        pytest.skip(why)
    asks, reference = clusters.reference(Topology(), LOAD)
    clusters.close()
    folder = tmp_path_factory.mktemp("nodes")
    server = TwoNodes(folder, str(clusters._tiny()), TOPOLOGY)
    try:
        server.start()
        server.known = asks, reference  # type: ignore[attr-defined]
        yield server
    finally:
        server.close()


@pytest.fixture
def two_nodes(_two_nodes: TwoNodes) -> TwoNodes:
    """With a fresh controller where groups were lost so often that it would soon see a crash loop,
    and wait for a minute."""
    if _two_nodes.groups_lost >= LOSSES:
        _two_nodes.stop()
        _two_nodes.start()
    return _two_nodes


def hurt(server: TwoNodes, how: str) -> None:
    if how == "cut":
        server.cable.cut()
    elif how == "raylet":
        for child in psutil.Process(server.node("b").pid).children(recursive=True):
            if child.name() == "raylet":
                child.kill()
    else:
        server.cable.drop(*{"both-ways": "ab", "to-the-node": "a", "from-the-node": "b"}[how])


async def whole(client: AsyncClient, timeout_s: float = 120) -> None:
    """Wait until the group has a rank on each node: an earlier test may have left a smaller one."""
    async with asyncio.timeout(timeout_s):
        while True:
            [replica] = (await client.cluster_state()).replicas
            if replica.state == "ready" and replica.tp == replica.tp_desired:
                return
            await asyncio.sleep(0.1)


async def cut(server: TwoNodes, how: str, wait_s: float, name: str) -> Outcome:
    """Streams run, one load after the other; the cable is harmed for a while; it heals, and they go
    on where they stood."""
    asks, reference = server.known  # type: ignore[attr-defined]
    line = len(server.said)
    async with AsyncClient(server.address, timeout=900) as client:
        await whole(client)
        over = asyncio.Event()
        asking = asyncio.create_task(keep_asking(client, asks, name, over))
        await asyncio.sleep(wait_s)
        assert not asking.done()
        at, since = time.monotonic(), len(server.said)
        await asyncio.to_thread(hurt, server, how)
        lost = await asyncio.to_thread(server.wait_said, LOST, since, 60)
        await asyncio.sleep(max(CUT_S - (time.monotonic() - at), 0))
        await asyncio.to_thread(server.heal)
        over.set()
        records = await asking
        outcome = Outcome(f"{NUMBERS[how]} {how}", NUMBERS[how], 0, len(records), [])
        outcome.faults = judge(records, reference, await idle(client))
    outcome.detect_s = [lost - at]
    outcome.gaps_s = [record.longest_gap() for record in records]
    outcome.groups_lost = sum(bool(re.search(LOST, text)) for _, text in server.said[line:])
    server.groups_lost += outcome.groups_lost
    return outcome


NUMBERS = {"cut": 16, "both-ways": 17, "to-the-node": 17, "from-the-node": 17, "raylet": 10}


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=pytest.mark.bar(number)) for how, number in NUMBERS.items()],
)
def test_streams_outlive_a_cable(
    two_nodes: TwoNodes, how: str, seed: int, report: Any, clusters: Any
) -> None:
    wait_s = random.Random(seed).uniform(0.5, 3)
    outcome = asyncio.run(cut(two_nodes, how, wait_s, clusters.name()))
    report.add(outcome)
    paused = max(outcome.gaps_s)
    print(
        f"{outcome.scenario}: noticed {outcome.detect_s}, pause {paused:.1f} s, {outcome.faults[:3]}"
    )
    assert outcome.faults == [], two_nodes.said[-20:]
    assert outcome.detect_s[0] <= 6
    assert paused > 1, "no stream met the harm"
    if os.getloadavg()[0] <= BUSY * (os.cpu_count() or 1):
        assert paused <= PAUSE_S


@pytest.mark.bar(18)
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_bad_line_is_no_death(two_nodes: TwoNodes, clusters: Any, seed: int, report: Any) -> None:
    """For a minute, 50 ms there and back, a twentieth of the packets lost each way, and some out
    of order."""
    asks, reference = two_nodes.known  # type: ignore[attr-defined]
    outcome = Outcome("18 bad-line", 18, seed, 0, [])

    async def ask() -> Tally:
        async with AsyncClient(two_nodes.address, timeout=900) as client:
            await whole(client)
            line = len(two_nodes.said)
            await asyncio.to_thread(two_nodes.cable.spoil, Line(seed=seed))
            ends, records = time.monotonic() + BAD_S, []
            while time.monotonic() < ends:
                records += await begin(client, asks, clusters.name()).finish(600)
            tally = await asyncio.to_thread(two_nodes.cable.mend)
            outcome.streams = len(records)
            outcome.gaps_s = [record.longest_gap() for record in records]
            outcome.faults = judge(records, reference, await idle(client))
            said = [text for _, text in two_nodes.said[line:]]
            outcome.groups_lost = sum(bool(re.search(LOST, text)) for text in said)
            return tally

    tally = asyncio.run(ask())
    report.add(outcome)
    print(f"18: {outcome.streams} streams, {tally}, pause {max(outcome.gaps_s):.1f} s at most")
    assert outcome.faults == [], two_nodes.said[-20:]
    assert outcome.groups_lost == 0
    assert tally.passed > 500
    assert 0.03 < tally.lost / (tally.passed + tally.lost) < 0.07
    assert tally.overtaken > 20


def test_a_line_is_as_bad_as_it_was_asked_to_be() -> None:
    """Packets are datagrams here, and nothing else is played."""
    ours, ends, tell = [], [], os.pipe()
    for _ in range(2):
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.settimeout(1)
        far.setblocking(False)
        ours.append(near)
        ends.append(far)
    line = Line(delay_s=0.03, jitter_s=0.03, loss=0.25, hurry=0.1, seed=1)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        carrying = pool.submit(carry, (ends[0].fileno(), ends[1].fileno()), line, tell[0])
        came: list[int] = []

        def receive() -> None:
            with contextlib.suppress(TimeoutError):
                while True:
                    came.append(int.from_bytes(ours[1].recv(10), "big"))

        receiving = pool.submit(receive)
        for number in range(400):
            ours[0].send(number.to_bytes(2, "big"))
            time.sleep(0.0005)
        receiving.result(30)
        os.write(tell[1], b"!")
        tally = carrying.result(10)
    assert len(set(came)) == len(came) == tally.passed == 400 - tally.lost
    assert 60 < tally.lost < 140
    assert tally.overtaken == sum(a < max(came[:i], default=0) for i, a in enumerate(came)) > 20
    for item in (*ours, *ends):
        item.close()
    for descriptor in tell:
        os.close(descriptor)
