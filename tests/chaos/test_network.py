"""Two nodes and the cable between them: tests 10, 16 and 17."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from harness import nodes
from harness.history import judge
from harness.load import Reading, begin
from harness.nodes import TwoNodes
from harness.running import LOST, Outcome, idle
from harness.scenarios import Load
from harness.server import Topology

from phalanx.controller.client import AsyncClient

LOAD = Load(16, 48)
TOPOLOGY = Topology(flags=("--collectives", "gloo", "--start-timeout-s", "20"))
CUT_S = 8.0


@pytest.fixture(scope="module")
def two_nodes(clusters: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
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


def hurt(server: TwoNodes, how: str) -> None:
    if how == "cut":
        server.cable.cut()
    elif how == "raylet":
        for child in psutil.Process(server.node("b").pid).children(recursive=True):
            if child.name() == "raylet":
                child.kill()
    else:
        server.cable.drop(*{"both-ways": "ab", "to-the-node": "a", "from-the-node": "b"}[how])


async def cut(server: TwoNodes, how: str, share: float, name: str) -> Outcome:
    """Streams run, the cable is harmed for a while; it heals, and they go on where they stood."""
    asks, reference = server.known  # type: ignore[attr-defined]
    total = sum(len(tokens) for answer in reference.values() for tokens, _ in answer.values())
    line = len(server.said)
    async with AsyncClient(server.address, timeout=900) as client:
        reading: Reading = begin(client, asks, name)
        await reading.reach(int(share * total))
        assert not reading.done
        at, since = time.monotonic(), len(server.said)
        await asyncio.to_thread(hurt, server, how)
        lost = await asyncio.to_thread(server.wait_said, LOST, since, 60)
        await asyncio.sleep(max(CUT_S - (time.monotonic() - at), 0))
        await asyncio.to_thread(server.heal)
        records = await reading.finish(500)
        outcome = Outcome(f"{NUMBERS[how]} {how}", NUMBERS[how], 0, len(asks), [])
        outcome.faults = judge(records, reference, await idle(client))
    outcome.detect_s = [lost - at]
    outcome.gaps_s = [record.longest_gap() for record in records]
    outcome.groups_lost = sum(bool(re.search(LOST, text)) for _, text in server.said[line:])
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
    share = random.Random(seed).uniform(0.05, 0.7)
    outcome = asyncio.run(cut(two_nodes, how, share, clusters.name()))
    report.add(outcome)
    print(f"{outcome.scenario}: noticed {outcome.detect_s}, {outcome.faults[:3]}")
    assert outcome.faults == [], two_nodes.said[-20:]
    assert outcome.detect_s[0] <= 6


@pytest.mark.bar(18)
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_bad_line_is_no_death(two_nodes: TwoNodes, clusters: Any) -> None:
    """50 ms of delay, a twentieth of the packets lost, some out of order."""
    if why := two_nodes.cable.spoil():
        pytest.skip(why)
    asks, reference = two_nodes.known  # type: ignore[attr-defined]
    line = len(two_nodes.said)

    async def ask() -> None:
        async with AsyncClient(two_nodes.address, timeout=900) as client:
            records = await begin(client, asks, clusters.name()).finish(600)
            assert judge(records, reference, await idle(client)) == []

    asyncio.run(ask())
    assert not [text for _, text in two_nodes.said[line:] if re.search(LOST, text)]
