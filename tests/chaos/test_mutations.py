"""Each guard is switched off, by these tests alone, and the test of it must see that."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness.harms import HARMS
from harness.history import judge
from harness.load import begin
from harness.running import idle
from harness.scenarios import SHM, Harm, Load

from phalanx.controller.client import AsyncClient

ROOT = Path(__file__).parents[2]
UNIT = "tests/unit/controller"
SET_ASIDE = (
    f"{UNIT}/test_suspects.py::"
    "test_a_request_whose_ranks_die_again_and_again_is_set_aside_and_others_are_not"
)
LOAD = Load(8, 48)


class Mutant(NamedTuple):
    """A guard, Python that takes it away, and tests that then fail."""

    guard: str
    patch: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "epoch of results",
        """
from phalanx.controller.scheduling.scheduler import Scheduler
from phalanx.protos.steps import StepResult
import msgspec
update = Scheduler.update
Scheduler.update = lambda self, result: update(
    self, msgspec.structs.replace(result, epoch=self._epoch)
)
""",
        (
            f"{UNIT}/scheduling/test_streams.py::test_results_of_another_epoch_are_ignored_and_counted",
        ),
    ),
    Mutant(
        "attempts of requests",
        """
from phalanx.controller.stream import Stream
Stream.name = property(lambda self: str(self._number))
""",
        (f"{UNIT}/test_engine.py::test_late_events_of_a_lost_replica_are_nobodys",),
    ),
    Mutant(
        "salt of tenants",
        """
from phalanx.controller.kvcache import prefix
root = prefix._root
prefix._root = lambda namespace, salt: root(namespace, b"")
""",
        (
            f"{UNIT}/kvcache/test_manager.py::test_tenants_do_not_see_each_other",
            f"{UNIT}/scheduling/test_sharing.py::test_a_tenant_reuses_its_own_prefixes_only",
        ),
    ),
    Mutant(
        "setting aside",
        """
from phalanx.controller.stream import Stream
lose = Stream.lose
Stream.lose = lambda self, **more: lose(self, blamed=False)
""",
        (SET_ASIDE,),
    ),
    Mutant(
        "probation",
        """
from phalanx.controller.scheduling.probation import Probation
Probation.add = lambda self, sample, tokens: None
""",
        (
            f"{UNIT}/scheduling/test_probation.py::test_32_suspects_cost_two_steps_of_their_own_each",
        ),
    ),
    Mutant(
        "quarantine",
        """
from phalanx.controller.quarantine import Quarantine
Quarantine.check = lambda self, prompt, params, now: None
""",
        (SET_ASIDE,),
    ),
    Mutant(
        "limits",
        """
from phalanx.protos.sampling import SamplingParams
SamplingParams.validate = lambda self, vocab_size, field="params": None
""",
        ("tests/service/test_refusals.py::test_every_bad_request_names_its_fields",),
    ),
    Mutant(
        "auditor of blocks",
        """
from phalanx.controller.kvcache.manager import KVCacheManager
KVCacheManager.check_integrity = lambda self: None
""",
        (f"{UNIT}/kvcache/test_manager.py::test_a_lost_reference_is_noticed",),
    ),
)


def run(tests: tuple[str, ...], folder: Path, patch: str) -> int:
    """Pytest's exit code for these tests, after the patch."""
    (folder / "mutant.py").write_text(patch, encoding="utf-8")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "mutant", *tests],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.returncode


@pytest.mark.chaos
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard.replace(" ", "-"))
def test_a_guard_that_is_off_turns_its_test_red(mutant: Mutant, tmp_path: Path) -> None:
    assert run(mutant.tests, tmp_path, "") == 0
    for test in mutant.tests:
        assert run((test,), tmp_path, mutant.patch) == 1


LATE = """
from phalanx.controller.journal import writer
Journal, held = writer.DurableJournal, {}
def begin(self, header):
    number, self._next_number = self._next_number, self._next_number + 1
    held[number] = writer._Work(number, header)
    return number
append = Journal.append
def late(self, number, events, **more):
    if number in held:
        self._put(held.pop(number))
    append(self, number, events, **more)
Journal.begin, Journal.append = begin, late
"""
"""A request is written with its first tokens: nothing has been sent by then, so nothing is lost."""
SEND_FIRST = """
def eager(self, number, events, *, over, then):
    then()
    late(self, number, events, over=over, then=lambda: None)
Journal.append = eager
"""


async def killed_before_the_first_commit(server: Any, known: Any, name: str) -> list[str]:
    """Kinds of faults, when the controller dies with the first tokens sampled and not on disk."""
    asks, reference = known
    async with AsyncClient(server.address, timeout=300) as client:
        reading = begin(client, asks, name)
        await HARMS["arm-controller"](server, Harm("arm-controller", point="sampled", seconds=1))
        records = await reading.finish()
        await server.restarting  # type: ignore[attr-defined]
        return sorted({fault.kind for fault in judge(records, reference, await idle(client))})


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_sending_before_the_journal_is_found(clusters: Any) -> None:
    """Test 13 sees that clients have tokens of requests that nobody knows any more. (Of requests
    that are known, what was not written is computed again, and is the same.)"""
    known = clusters.reference(SHM, LOAD)
    for prelude in ("", SEND_FIRST):
        server = clusters.get(replace(SHM, prelude=LATE + prelude))
        kinds = asyncio.run(killed_before_the_first_commit(server, known, clusters.name()))
        assert kinds == (["lost"] if prelude else [])


LEAK = """
from phalanx.controller.kvcache.manager import KVCacheManager
release = KVCacheManager.release
def leaky(self, seq):
    self._share(self._tables[seq].blocks[0])
    release(self, seq)
KVCacheManager.release = leaky
"""


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_block_that_is_not_freed_is_found(clusters: Any) -> None:
    """Test 27's look at the blocks, and that of every scenario."""
    asks, reference = clusters.reference(SHM, LOAD)
    server = clusters.get(replace(SHM, prelude=LEAK))

    async def ask() -> list[str]:
        async with AsyncClient(server.address, timeout=300) as client:
            records = await begin(client, asks, clusters.name()).finish()
            return sorted({fault.kind for fault in judge(records, reference, await idle(client))})

    assert asyncio.run(ask()) == ["blocks"]
