"""Every scenario of the table: streams run, something is done, and nobody has lost anything."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from harness.report import Report
from harness.running import Outcome, percentile, play
from harness.scenarios import SCENARIOS, Scenario
from harness.server import GROUPS

BUSY = 2.0
"""Load for each core from which on times say nothing, and are only written down."""

GROUPED = {"slow", "memory"}
"""Harms that need control groups."""


def refused() -> str:
    """Why control groups cannot be made here; empty where they can."""
    if not GROUPS.is_dir():
        return "control groups of version 1 are not mounted"
    return "" if os.access(GROUPS, os.W_OK) else "control groups need root"


CASES = [
    pytest.param(
        scenario,
        id=f"{scenario.number}-{scenario.name}",
        marks=[pytest.mark.bar(scenario.number), *([] if scenario.gate else [pytest.mark.chaos])],
    )
    for scenario in sorted(SCENARIOS, key=lambda item: repr(item.topology))
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", CASES)
def test_nothing_is_lost_repeated_or_changed(
    scenario: Scenario, clusters: Any, report: Report, seed: int, repeats: int
) -> None:
    if {harm.what for harm in scenario.harms} & GROUPED and (why := refused()):
        pytest.skip(why)
    asks, reference = clusters.reference(scenario.topology, scenario.load)
    outcomes = []
    for turn in range(repeats):
        server = clusters.get(scenario.topology)
        outcome = asyncio.run(play(server, scenario, asks, reference, seed + turn, clusters.name()))
        report.add(outcome)
        outcomes.append(outcome)
        print(
            f"{outcome.scenario} seed {outcome.seed}: {len(outcome.faults)} faults, "
            f"noticed {[round(s, 2) for s in outcome.detect_s]}, "
            f"pause p95 {percentile(outcome.gaps_s, 95):.1f} s, {outcome.seconds:.0f} s"
        )
        assert outcome.faults == [], (outcome.faults[:5], server.said[-20:])
        if scenario.groups is not None:
            assert outcome.groups_lost <= scenario.groups
    hold(scenario, outcomes)


def hold(scenario: Scenario, outcomes: list[Outcome]) -> None:
    """The times that are promised, where the machine had time for us."""
    if os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        return
    noticed = [seconds for outcome in outcomes for seconds in outcome.detect_s]
    gaps = [gap for outcome in outcomes for gap in outcome.gaps_s]
    if scenario.detect_s is not None:
        assert max(noticed) <= scenario.detect_s
    if scenario.gap_s is not None:
        assert percentile(gaps, 95) <= scenario.gap_s
