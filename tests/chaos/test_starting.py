"""Test 15: what goes wrong while a cluster starts is told in a line, and nothing stays behind."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from harness.scenarios import SHM, TINY
from harness.server import Server


@pytest.fixture
def server(clusters: Any) -> Iterator[Server]:
    clusters.close()
    made = clusters.fresh(TINY)
    yield made
    made.sweep()


@pytest.mark.bar(15)
@pytest.mark.chaos
def test_a_port_that_is_taken_ends_the_start(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server._port = str(taken.getsockname()[1])
        server.start(wait=False)
        assert server.wait(120) == 2
    assert any("port" in text and "cannot be bound" in text for _, text in server.said)
    assert server.gone() == ()


@pytest.mark.bar(15)
@pytest.mark.chaos
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_while_it_starts_ends_the_start(server: Server, rank: int) -> None:
    """Also before it loads: as soon as there are processes of ranks."""
    server.start(wait=False)
    deadline = time.monotonic() + 60
    killed = False
    while not killed and time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            ranks = [item for item in server.processes() if "RankActor" in item.name()]
            if len(ranks) == 2:
                sorted(ranks, key=lambda item: item.pid)[rank].kill()
                killed = True
        time.sleep(0.02)
    assert killed
    assert server.wait(120) == 1
    assert any(text.startswith("error: ") for _, text in server.said)
    assert server.gone() == ()


@pytest.mark.bar(15)
@pytest.mark.chaos
def test_more_ranks_than_the_model_has_work_for_are_refused(clusters: Any) -> None:
    import dataclasses

    server = clusters.fresh(dataclasses.replace(SHM, tp=2000))
    server.start(wait=False)
    assert server.wait(60) == 2
    assert any("tp" in text for _, text in server.said)
    assert server.gone() == ()
