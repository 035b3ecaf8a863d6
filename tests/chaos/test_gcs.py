"""Ray's GCS is killed and comes back with its tables: test 11."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from harness.head import OwnHead
from harness.history import judge
from harness.load import begin, keep_asking
from harness.running import LOST, Outcome, idle
from harness.scenarios import Load
from harness.server import Topology

from phalanx.controller.client import AsyncClient

LOAD = Load(8, 48)
TOPOLOGY = Topology(flags=("--collectives", "gloo", "--start-timeout-s", "20"))
AWAY_S = 10.0
LONG_S = 75.0
"""Longer than Ray's processes wait by themselves."""


@pytest.fixture(scope="module")
def own_head(clusters: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnHead]:
    asks, reference = clusters.reference(Topology(), LOAD)
    clusters.close()
    server = OwnHead(tmp_path_factory.mktemp("head"), str(clusters._tiny()), TOPOLOGY)
    try:
        server.start()
        server.known = asks, reference  # type: ignore[attr-defined]
        yield server
    finally:
        server.close()


async def killed(server: OwnHead, name: str, away_s: float) -> Outcome:
    """Streams run while the GCS is away, and for a while after."""
    asks, reference = server.known  # type: ignore[attr-defined]
    line, over = len(server.said), asyncio.Event()
    outcome = Outcome(f"11 away-{away_s:.0f}-s", 11, 0, 0, [])
    async with AsyncClient(server.address, timeout=300) as client:
        asking = asyncio.create_task(keep_asking(client, asks, name, over))
        await asyncio.sleep(2)
        await asyncio.to_thread(server.kill_gcs)
        await asyncio.sleep(away_s)
        await asyncio.to_thread(server.start_gcs)
        await asyncio.sleep(AWAY_S / 2)
        over.set()
        records = await asking
        outcome.faults = judge(records, reference, await idle(client))
    outcome.streams = len(records)
    outcome.gaps_s = [record.longest_gap() for record in records]
    outcome.groups_lost = sum(bool(re.search(LOST, text)) for _, text in server.said[line:])
    return outcome


async def lost_rank(server: OwnHead, name: str, away: bool, away_s: float) -> tuple[Outcome, float]:
    """A rank is killed once the GCS is back, or while it is away; seconds from its start until a
    new group is ready."""
    asks, reference = server.known  # type: ignore[attr-defined]
    line = len(server.said)
    what = "meanwhile" if away else "after"
    outcome = Outcome(f"11 rank-killed-{what}-{away_s:.0f}-s", 11, 0, len(asks), [])
    async with AsyncClient(server.address, timeout=400) as client:
        reading = begin(client, asks, name)
        await reading.reach(40)
        await asyncio.to_thread(server.kill_gcs)
        at = time.monotonic()
        if away:
            server.ranks()[1].kill()
        await asyncio.sleep(away_s)
        await asyncio.to_thread(server.start_gcs)
        back = time.monotonic()
        if not away:
            reading = begin(client, asks, f"{name}-again")
            await reading.reach(40)
            at = time.monotonic()
            server.ranks()[1].kill()
        lost = await asyncio.to_thread(server.wait_said, LOST, line, 60)
        ready = await asyncio.to_thread(server.wait_said, r"ready again", line, 120)
        records = await reading.finish(300)
        outcome.faults = judge(records, reference, await idle(client))
    outcome.detect_s = [lost - at]
    outcome.gaps_s = [record.longest_gap() for record in records]
    outcome.groups_lost = sum(bool(re.search(LOST, text)) for _, text in server.said[line:])
    return outcome, ready - back


@pytest.mark.bar(11)
@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("away_s", [AWAY_S, LONG_S])
def test_streams_do_not_notice_that_the_gcs_is_away(
    own_head: OwnHead, report: Any, clusters: Any, away_s: float
) -> None:
    outcome = asyncio.run(killed(own_head, clusters.name(), away_s))
    report.add(outcome)
    print(f"{outcome.streams} streams, longest pause {max(outcome.gaps_s):.2f} s")
    assert outcome.faults == [], own_head.said[-20:]
    assert outcome.groups_lost == 0
    assert max(outcome.gaps_s) < AWAY_S / 2


@pytest.mark.bar(11)
@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("away", "away_s"),
    [(False, AWAY_S), (True, AWAY_S), (True, LONG_S)],
    ids=["after", "meanwhile", "meanwhile-long"],
)
def test_a_lost_rank_is_replaced_once_the_gcs_is_back(
    own_head: OwnHead, report: Any, clusters: Any, away: bool, away_s: float
) -> None:
    """Also where Ray gave up on what it was to be told of the lost group's places."""
    outcome, seconds = asyncio.run(lost_rank(own_head, clusters.name(), away, away_s))
    report.add(outcome)
    print(f"{outcome.scenario}: noticed {outcome.detect_s}, ready {seconds:.1f} s after the GCS")
    assert outcome.faults == [], own_head.said[-20:]
    assert outcome.groups_lost == 1
