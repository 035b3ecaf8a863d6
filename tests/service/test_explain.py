"""Why a request went to its replica: over the wire, and on the screen."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
from rich.console import Console

from phalanx.controller.commands.explain import copied_from, estimate_table
from phalanx.controller.kvcache.prefix import PrefixNaming
from phalanx.controller.routing.loads import Loads
from phalanx.controller.routing.pace import Pace
from phalanx.controller.routing.placer import Placement, Placer
from phalanx.controller.routing.router import Request, Work
from phalanx.controller.server.convert import placement
from phalanx.protos.errors import InvalidArgument, NotFound


def decisions(tenant: str) -> list[Placement]:
    """Two decisions for one request: its first replica was lost, or so it may have been."""
    placer = Placer()
    for replica in range(3):
        placer.loads.join(replica, places=8, room=10_000)
        placer.loads.measured(replica, Pace(1000.0, 0.02, 0.001))
    placer.loads.charge(0, Work(), Work(500, 2, 100, 900))
    for tokens in (100, 140):
        request = Request(tokens, 1, 50)
        placer.choose(tenant, "r", [1] * 100, request, PrefixNaming(4, b""))
        placer.loads.leave(1)
    return placer.placements()


def test_the_numbers_of_both_decisions(serve: Any, say: Any, token_file: str) -> None:
    async def main() -> None:
        async with serve(say([50]), token_file=token_file, token="b") as served:
            served.engine.decisions = decisions("blue")
            first, second = (await served.client.explain("r")).placements
            assert (first.replica_id, first.candidates, first.tokens) == ("replica-1", 3, 100)
            assert (second.replica_id, second.candidates) == ("replica-2", 2)
            chosen, other = second.estimates
            assert chosen.cost_s == pytest.approx(2 * 0.14) and other.replica_id == "replica-0"
            # 500 tokens are queued there, half a step runs yet, two streams lose 10% of 0.14 s each
            # and 2 ms in each of the 50 steps of the answer, which loses as much; one a second comes
            later_s = 0.14 * 0.5 + 0.14 * 0.14 / 2
            there_s = 0.1 * 2 * (0.14 + 2 * 50 * 0.001)
            assert other.cost_s == pytest.approx(0.64 + 0.003 + 0.14 + later_s + there_s)
            assert other.streams == 2 and other.queue_tokens == 500
            screen = io.StringIO()
            Console(file=screen, width=100).print(estimate_table(second))
            lines = screen.getvalue().splitlines()
            assert any("replica-2" in line and "280.0" in line for line in lines)

    asyncio.run(main())


def test_a_copy_is_shown_with_its_source() -> None:
    loads = Loads()
    for replica in range(2):
        loads.join(replica, token_bytes=1e4)
        loads.measured(replica, Pace(1000.0, 0.02, 0.001))
    loads.charge(1, Work(), Work(2000))
    loads.copy_bytes_per_s = 1e8
    said = placement(loads.choose(Request(1000), [(900, 0b10)]))
    assert copied_from(said) == ", 900 of them copied from replica-1"
    screen = io.StringIO()
    Console(file=screen, width=120).print(estimate_table(said))
    [line] = [line for line in screen.getvalue().splitlines() if "replica-0" in line]
    assert line.split()[:3] == ["replica-0", "0", "900"] and "110.0" in line


def test_others_and_unknown_requests_are_not_found(serve: Any, say: Any, token_file: str) -> None:
    async def main() -> None:
        async with serve(say([50]), token_file=token_file, token="r-1") as served:
            served.engine.decisions = decisions("blue")
            said = set()
            for request_id in ("r", "never"):
                with pytest.raises(NotFound) as caught:
                    await served.client.explain(request_id)
                said.add(str(caught.value).replace(f"'{request_id}'", "..."))
            assert len(said) == 1, "another tenant's request is as unknown as none"
            for wrong in ("", "a b"):
                with pytest.raises(InvalidArgument, match="request_id"):
                    await served.client.explain(wrong)

    asyncio.run(main())
