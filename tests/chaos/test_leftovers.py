"""However a cluster ends, nothing of it stays: no process, no shared memory, no socket."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from harness.history import judge
from harness.load import begin
from harness.running import LOST
from harness.scenarios import SHM, Load
from harness.server import Server

from phalanx.controller.client import AsyncClient

LOAD = Load(8, 180)


async def busy(server: Server, known: Any, name: str) -> None:
    """Leave it with streams on their way."""
    async with AsyncClient(server.address, timeout=60) as client:
        reading = begin(client, known[0], name)
        await reading.reach(40)
        for task in reading.tasks:
            task.cancel()
        await asyncio.gather(*reading.tasks, return_exceptions=True)


def end(server: Server, how: str) -> None:
    """In one of the ways in which clusters end."""
    since = len(server.said)
    if how == "everything-killed":
        for process in server.processes():
            process.send_signal(signal.SIGSTOP)  # so that nobody can tidy up after another
        server.sweep()
        server.wait()
    elif how == "controller-killed":
        server.kill()
    else:
        if how == "ranks-killed":
            for rank in server.ranks().values():
                rank.kill()
            server.wait_said(LOST, since, 30)
        server.stop()


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "how", ["terminated", "ranks-killed", "controller-killed", "everything-killed"]
)
def test_nothing_is_left_of_a_cluster(clusters: Any, how: str) -> None:
    """A killed one leaves the names of its sockets, which nobody answers at, and Ray's logs; the
    next start tidies up."""
    known = clusters.reference(SHM, LOAD)
    clusters.close()
    server = clusters.fresh(SHM)
    try:
        server.start()
        asyncio.run(busy(server, known, clusters.name()))
        end(server, how)
        assert server.gone() == ()
        if how in ("controller-killed", "everything-killed"):
            left = server.remains()
            assert left.segments == ()
            assert left.sockets != ()
            server.start()
            server.stop()
        assert judge([], remains=server.remains()) == []
    finally:
        server.sweep()
