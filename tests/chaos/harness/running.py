"""A scenario is run, and what came of it is put in figures."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.harms import HARMS
from harness.history import Answer, Fault, Record, Remains, judge
from harness.load import Ask, begin
from harness.scenarios import Harm, Scenario
from harness.server import Server
from phalanx.controller.client import AsyncClient

LOST = r"\breplica-\d+: (?!starting a new|ready again|to be replaced|tp is)"
READY_S = 120.0
IDLE_S = 20.0


@dataclass
class Outcome:
    """One run of one scenario."""

    scenario: str
    number: int
    seed: int
    streams: int
    faults: list[Fault]
    detect_s: list[float] = field(default_factory=list)
    """From each harm until the controller said that a group is lost."""
    gaps_s: list[float] = field(default_factory=list)
    """Each stream's longest pause."""
    groups_lost: int = 0
    seconds: float = 0.0

    def lost(self) -> int:
        """Streams without their one right end, or with tokens missing."""
        return len({f.request for f in self.faults if f.kind in ("lost", "open", "skipped")})

    def duplicated(self) -> int:
        """Streams in which a token came twice, or an end."""
        return len({f.request for f in self.faults if f.kind in ("duplicated", "ended-twice")})

    def changed(self) -> int:
        """Streams whose tokens are others than undisturbed."""
        return len({f.request for f in self.faults if f.kind == "changed"})


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=1000, method="inclusive")[int(percent * 10) - 1]


async def undisturbed(server: Server, asks: Sequence[Ask], name: str) -> list[Record]:
    """The load, with nothing done to it."""
    async with AsyncClient(server.address, timeout=600) as client:
        return await begin(client, asks, name).finish(600)


async def play(
    server: Server,
    scenario: Scenario,
    asks: Sequence[Ask],
    reference: Mapping[int, Answer],
    seed: int,
    name: str,
) -> Outcome:
    """One run. Raises `AssertionError` where the cluster does not come back."""
    draw = random.Random(seed)
    began, line = time.monotonic(), len(server.said)
    total = sum(len(tokens) for answer in reference.values() for tokens, _ in answer.values())
    outcome = Outcome(f"{scenario.number} {scenario.name}", scenario.number, seed, len(asks), [])
    async with AsyncClient(server.address, timeout=600) as client:
        reading = begin(client, asks, name)
        for place in _places(scenario.harms, draw):
            harm, share = place
            await reading.reach(int(share * total))
            assert not reading.done, "the harm came too late: the load is too small"
            since, at = len(server.said), time.monotonic()
            await HARMS[harm.what](server, harm)
            if scenario.detect_s is not None:
                lost = await asyncio.to_thread(server.wait_said, LOST, since, READY_S)
                outcome.detect_s.append(lost - at)
        records = await reading.finish(400)
        if restarting := getattr(server, "restarting", None):
            await asyncio.wait_for(restarting, READY_S)
            server.restarting = None  # type: ignore[attr-defined]
        remains = await idle(client)
    outcome.groups_lost = sum(bool(re.search(LOST, text)) for _, text in server.said[line:])
    outcome.gaps_s = [record.longest_gap() for record in records]
    outcome.faults = judge(records, reference, remains)
    outcome.seconds = time.monotonic() - began
    return outcome


def _places(harms: Sequence[Harm], draw: random.Random) -> list[tuple[Harm, float]]:
    """Harms with the part of all tokens after which each comes, in their order."""
    return [(harm, draw.uniform(*harm.at)) for harm in harms]


async def idle(client: AsyncClient) -> Remains:
    """Wait until all replicas are ready and free, but not for ever; what is held then."""
    total = free = 0
    ends = time.monotonic() + READY_S
    while time.monotonic() < ends:
        with contextlib.suppress(Exception):
            replicas = (await client.cluster_state()).replicas
            if all(replica.state == "ready" for replica in replicas):
                ends = min(ends, time.monotonic() + IDLE_S)
                total = sum(replica.kv_blocks_total for replica in replicas)
                free = sum(replica.kv_blocks_free for replica in replicas)
                if total and total == free:
                    break
        await asyncio.sleep(0.05)
    return Remains(total or 1, free)
