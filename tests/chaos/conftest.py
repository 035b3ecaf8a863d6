"""The harness for all, which of the tests run, and the report."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness.history import Answer, judge, reference_of
from harness.load import Ask, mixed
from harness.report import Report
from harness.running import undisturbed
from harness.scenarios import Load
from harness.server import Server, Topology

LOAD_SEED = 11
LOSSES = 3
"""A server that has lost so many groups is replaced: it would soon count as a crash loop."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos")
    group.addoption("--repeats", type=int, default=1, help="how often each scenario runs")
    group.addoption("--seed", type=int, help="of when harm is done; drawn and printed by default")
    group.addoption("--only", default="", help="numbers of tests, such as 1,4,8")
    group.addoption("--soak-minutes", type=float, default=3.0, help="how long test 37 takes")
    group.addoption("--report", type=Path, metavar="FILE", help="JSON; a table is put beside it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave those that `--only` names."""
    wanted = {int(number) for number in config.getoption("--only", "").split(",") if number}
    if not wanted:
        return
    kept = [item for item in items if _numbers(item) & wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _numbers(item: pytest.Item) -> set[int]:
    return {number for mark in item.iter_markers("bar") for number in mark.args}


def _option(config: pytest.Config, name: str, default: object) -> object:
    value = config.getoption(name, None)
    return default if value is None else value


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """Of this run; printed, so that it can be repeated."""
    found = int(_option(pytestconfig, "--seed", random.SystemRandom().randrange(10**6)))
    print(f"\nchaos: --seed {found}")
    return found


@pytest.fixture(scope="session")
def repeats(pytestconfig: pytest.Config) -> int:
    return int(_option(pytestconfig, "--repeats", 1))


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config, seed: int) -> Iterator[Report]:
    """Where outcomes are written down."""
    made = Report(seed)
    yield made
    file = pytestconfig.getoption("--report", None)
    if file is not None:
        made.write(file)


class Clusters:
    """Servers by topology, and what they say undisturbed. One runs at a time."""

    def __init__(self, folder: Path, tiny: Callable[..., Path]) -> None:
        self._folder, self._tiny = folder, tiny
        self._server: Server | None = None
        self._references: dict[tuple[str, Load], tuple[list[Ask], dict[int, Answer]]] = {}
        self._count = 0

    def name(self) -> str:
        """Of a run: no other has it."""
        self._count += 1
        return f"run-{self._count}"

    def get(self, topology: Topology) -> Server:
        """A running server that has not been harmed too often."""
        server = self._server
        fresh = server is not None and server.alive and server.groups_lost < LOSSES
        if server is not None and fresh and server.topology == topology:
            return server
        self.close()
        self._server = self.fresh(topology)
        self._server.start()
        return self._server

    def fresh(self, topology: Topology) -> Server:
        """One that is not started and belongs to the test."""
        self._count += 1
        folder = self._folder / f"server-{self._count}"
        folder.mkdir()
        model = str(self._tiny()) if topology.model == "tiny" else topology.model
        return Server(folder, model, topology)

    def reference(self, topology: Topology, load: Load) -> tuple[list[Ask], dict[int, Answer]]:
        """The load's requests and answers, from two undisturbed runs that agree."""
        key = (topology.model, load)
        if key not in self._references:
            asks = mixed(load.streams, load.tokens, LOAD_SEED)
            server = self.get(topology)
            runs = [asyncio.run(undisturbed(server, asks, self.name())) for _ in range(2)]
            self._references[key] = asks, reference_of(runs)
        return self._references[key]

    def close(self) -> None:
        """End the server, and see that nothing of it is left."""
        if self._server is None:
            return
        server, self._server = self._server, None
        try:
            server.stop()
            faults = judge([], remains=server.remains())
        finally:
            with contextlib.suppress(Exception):
                server.sweep()
        assert faults == [], faults


@pytest.fixture(scope="package")
def clusters(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Path], smollm2_gguf: Path
) -> Iterator[Clusters]:
    made = Clusters(tmp_path_factory.mktemp("chaos"), tiny_llama)
    yield made
    made.close()
