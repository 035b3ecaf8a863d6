"""Ranks that are processes of their own, behind the sockets of a fleet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.cluster.local_fleet import LocalFleet
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.wire import Hello

Address = tuple[str, int]

RANK = """
import json, os, socket, sys, time
from pathlib import Path
from types import SimpleNamespace

from phalanx.protos.wire import Hello
from phalanx.workers.group import build_engine
from phalanx.workers.serve import serve_rank

told = json.load(sys.stdin)
rank, port = told["rank"], Path(told["folder"]) / "port"
listener = None
if rank == 0:
    listener = socket.create_server(("127.0.0.1", 0))
    part = port.with_suffix(".part")
    part.write_text(str(listener.getsockname()[1]))
    part.rename(port)
while not port.exists():
    time.sleep(0.01)
rendezvous = SimpleNamespace(
    host="127.0.0.1",
    port=int(port.read_text()),
    collectives=told["collectives"],
    threads=1,
    timeout_s=30.0,
)
serve_rank(
    tuple(told["address"]),
    Hello(rank, told["epoch"], bytes.fromhex(told["secret"])),
    lambda spec: build_engine(spec, rank, rendezvous, listener),
    own_process=True,
)
"""


class Processes:
    """Mains of a `LocalFleet` whose ranks are processes."""

    def __init__(self, folder: Path, count: int, collectives: str) -> None:
        self._folder, self._count, self._collectives = folder, count, collectives
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}

    def mains(self) -> list[Callable[[Address, Hello], None]]:
        return [self.main] * self._count

    def main(self, address: Address, hello: Hello) -> None:
        told = {
            "rank": hello.rank,
            "folder": str(self._folder),
            "collectives": self._collectives,
            "address": address,
            "epoch": hello.epoch,
            "secret": hello.secret.hex(),
        }
        rank = self.ranks[hello.rank] = subprocess.Popen(
            [sys.executable, "-c", RANK],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        rank.communicate(json.dumps(told).encode())

    def kill(self) -> None:
        for rank in self.ranks.values():
            rank.kill()
            rank.wait()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[int, str], Processes]]:
    made: list[Processes] = []

    def make(count: int, collectives: str) -> Processes:
        made.append(Processes(tmp_path, count, collectives))
        return made[-1]

    yield make
    for group in made:
        group.kill()


@pytest.fixture
def start() -> Iterator[Callable[..., LocalFleet]]:
    """`start(spec, mains)`: a fleet that is ready, and stopped at the end of the test."""
    fleets: list[LocalFleet] = []

    def make(spec: WorkerSpec, mains: list[Any]) -> LocalFleet:
        fleet = LocalFleet(mains, start_timeout_s=120)
        fleets.append(fleet)
        facts = fleet.start(spec, lambda rank, done, total: None)
        assert [fact.rank for fact in facts] == list(range(len(mains)))
        return fleet

    yield make
    for fleet in fleets:
        fleet.stop()
