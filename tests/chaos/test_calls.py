"""Messages between the step loop and its ranks are harmed: test 19."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from harness.calls import BENIGN, FATAL, PRELUDE, Calls, arm, disarm, executed, repeated
from harness.history import judge
from harness.load import begin
from harness.running import LOST, Outcome, idle
from harness.scenarios import Load
from harness.server import Server, Topology

from phalanx.controller.client import AsyncClient

LOAD = Load(8, 160)
TOPOLOGY = Topology(flags=("--collectives", "gloo", "--step-timeout-s", "10"), prelude=PRELUDE)
SHARE = 0.1


async def disturbed(server: Server, known: Any, calls: Calls, name: str) -> tuple[Outcome, int]:
    """The load, while messages are harmed; how many were."""
    asks, reference = known
    line = len(server.said)
    outcome = Outcome(f"19 {calls.kind}", 19, calls.seed, len(asks), [])
    async with AsyncClient(server.address, timeout=300) as client:
        arm(server.points, calls)
        records = await begin(client, asks, name).finish()
        count = disarm(server.points)
        outcome.faults = judge(records, reference, await idle(client))
    outcome.gaps_s = [record.longest_gap() for record in records]
    outcome.groups_lost = sum(bool(re.search(LOST, text)) for _, text in server.said[line:])
    return outcome, count


@pytest.mark.bar(19)
@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", [*BENIGN, *FATAL])
def test_no_step_is_executed_twice(clusters: Any, seed: int, report: Any, kind: str) -> None:
    """One in ten messages is late or comes in pieces, and nobody sees that; one message is lost,
    torn, or comes twice, and its group ends for it. Tokens are those of an undisturbed run."""
    known = clusters.reference(TOPOLOGY, LOAD)
    server, fatal = clusters.get(TOPOLOGY), kind in FATAL
    calls = Calls(kind, SHARE, fatal, seed)
    outcome, count = asyncio.run(disturbed(server, known, calls, clusters.name()))
    server.groups_lost += outcome.groups_lost
    report.add(outcome)
    steps = executed(server.points)
    print(f"{kind}: {count} messages, {sum(map(len, steps.values()))} steps")
    assert outcome.faults == [], server.said[-20:]
    assert repeated(steps) == []
    assert max(map(len, steps.values())) > 20
    assert (count, outcome.groups_lost) == (1, 1) if fatal else count > 3
    assert fatal or outcome.groups_lost == 0


def test_steps_that_are_executed_twice_are_found() -> None:
    assert repeated({"1-0": [0, 1, 2], "1-1": [0, 1, 2]}) == []
    assert repeated({"1-0": [0, 1, 1]}) == ["1-0: step 1 twice"]
    assert repeated({"1-0": [0, 2, 1]}) == ["1-0: steps are not in order"]
