"""Test 34: one request kills every group that sees it; the others must not pay for that."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from harness.history import judge
from harness.load import begin
from harness.running import LOST, idle
from harness.scenarios import MANY, SHM

from phalanx.controller.client import AsyncClient
from phalanx.controller.stream import SET_ASIDE_AFTER_LOSSES
from phalanx.protos.errors import SetAside

POISON = 401
"""A token that no prompt of the load has."""


async def poisoned(server: Any, asks: Any, reference: Any, name: str, action: str) -> int:
    async with AsyncClient(server.address, timeout=600) as client:
        server.arm("poison", action=action, token=POISON, stays=True, rank=1)
        line = len(server.said)
        reading = begin(client, asks[:31], name)
        with pytest.raises(SetAside):
            await client.complete([5, POISON, 6], request_id=f"{name}-poison", max_tokens=20)
        records = await reading.finish()
        assert judge(records, reference, await idle(client)) == []
        deaths = sum(bool(re.search(LOST, text)) for _, text in server.said[line:])
        # another id, another seed: it is known by what it asks
        with pytest.raises(SetAside):
            await client.complete([5, POISON, 6], seed=99, max_tokens=20)
        server.disarm("poison")
        assert len((await client.complete([5, 6, 7], max_tokens=5, ignore_eos=True)).token_ids) == 5
    return deaths


@pytest.mark.bar(34)
@pytest.mark.chaos
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("action", "most"), [("abort", 2), ("raise", 2), ("kill", SET_ASIDE_AFTER_LOSSES)]
)
def test_poison_is_set_aside_and_the_others_end_well(
    clusters: Any, report: Any, action: str, most: int
) -> None:
    """Where ranks seem to be killed from outside, nobody is suspected of the first death."""
    asks, reference = clusters.reference(SHM, MANY)
    clusters.close()  # its losses would add up to a crash loop
    server, name = clusters.get(SHM), clusters.name()
    deaths = asyncio.run(poisoned(server, asks, reference, name, action))
    clusters.close()
    report.note(34, f"poison {action}", groups_lost=deaths)
    assert 2 <= deaths <= most
