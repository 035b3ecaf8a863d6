"""The benchmark beside other engines: what is asked, what the figures amount to, what may fail."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
DRIVER = """
import os
from driving import Job, Output, serve

def load(settings):
    if settings.get("broken"):
        raise OSError("no such engine here")

    def run(job):
        if job.output_tokens == settings.get("dies"):
            os._exit(3)
        count = job.output_tokens - settings.get("short", 0)
        return [Output(None, [7] * count) for _ in job.prompts]

    return run, {"version": "1"}

serve(load)
"""


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A module of the benchmark, by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return lambda name: importlib.import_module(f"peers.{name}")


@pytest.fixture
def start(part: Callable[[str], Any], tmp_path: Path) -> Callable[..., Any]:
    """Starts a driver of an engine that writes sevens."""
    module = part("driver")
    script = tmp_path / "drive_sevens.py"
    (tmp_path / "driving.py").symlink_to(BENCH / "peers" / "drivers" / "driving.py")
    script.write_text(DRIVER, encoding="utf-8")

    def begin(**settings: Any) -> Any:
        log = tmp_path / "words.log"
        return module.Driver(
            Path(sys.executable), str(script), settings, log, ours=False, load_s=60
        )

    return begin


def test_prompts_are_of_their_round_and_a_shared_prefix_is_computed_first(
    part: Callable[[str], Any],
) -> None:
    workloads = part("workloads")
    [job] = workloads.STREAMS.jobs(1000, [2], seed=1)
    assert [len(prompt) for prompt in job["prompts"]] == [128] * 64
    assert job["output_tokens"] == 128 and job["room"] == 256
    assert workloads.STREAMS.jobs(1000, [2], seed=1) == [job]
    assert workloads.STREAMS.jobs(1000, [2], seed=2) != [job]
    assert all(2 not in prompt for prompt in job["prompts"])

    before, timed = workloads.SHARED.jobs(1000, [2], seed=1)
    prefix = before["prompts"][0][:1024]
    assert all(prompt[:1024] == prefix for prompt in timed["prompts"])
    assert len({tuple(prompt) for prompt in timed["prompts"]}) == 32


def test_ratios_are_of_the_same_round_and_more_is_always_better(
    part: Callable[[str], Any],
) -> None:
    workloads, figures = part("workloads"), part("figures").Figures()

    def ran(workload: Any, system: str, number: int, seconds: float) -> None:
        answer = {"seconds": seconds, "first_s": [seconds] * workload.requests}
        figures.runs[workload.name][system][number] = answer

    for number, (ours, theirs) in enumerate([(1.0, 2.0), (2.0, 6.0), (4.0, 4.0)]):
        ran(workloads.SINGLE, "us", number, ours)
        ran(workloads.SINGLE, "them", number, theirs)
        ran(workloads.COLD, "us", number, ours)
        ran(workloads.COLD, "them", number, theirs)
    ran(workloads.SINGLE, "slow", 0, 10.0)
    assert figures.median(workloads.SINGLE, "us") == 64.0
    assert figures.median(workloads.COLD, "us") == 2000.0
    assert figures.ratio(workloads.SINGLE, "us", "them") == 2.0
    assert figures.ratio(workloads.COLD, "us", "them") == 2.0
    assert figures.ratio(workloads.SINGLE, "us", "slow") == 10.0  # they met in one round only
    assert figures.ratio(workloads.SINGLE, "us", "absent") is None


def test_peers_and_ourselves_take_turns(part: Callable[[str], Any]) -> None:
    assert part("session").interleave(["a", "b", "c"], ["x"]) == ["a", "x", "b", "c"]
    assert part("session").interleave(["a"], ["x", "y"]) == ["a", "x", "y"]


def test_a_driver_answers_and_says_why_it_cannot(
    part: Callable[[str], Any], start: Callable[..., Any]
) -> None:
    failed = part("driver").DriverFailed
    job = {"prompts": [[1, 2], [3]], "output_tokens": 4, "room": 6}
    driver = start()
    answer = driver.run(job, 60)
    driver.close()
    assert answer["counts"] == [4, 4] and answer["tokens"] == [7, 7, 7, 7]
    assert set(answer["cores"]) == {"engine"}

    with pytest.raises(failed, match="OSError: no such engine here"):
        start(broken=True)
    driver = start(short=1)
    with pytest.raises(failed, match="3, 3. tokens instead of 4"):
        driver.run(job, 60)
    driver.close()
    driver = start(dies=4)
    with pytest.raises(failed, match="ended with code 3"):
        driver.run(job, 60)
    driver.close()


def test_an_environment_that_cannot_be_made_says_why(
    part: Callable[[str], Any], tmp_path: Path
) -> None:
    module = part("environments")
    with pytest.raises(module.SetUpFailed, match="no-such-thing.*words.log"):
        module.run_logged(
            [sys.executable, "-c", "raise SystemExit('no-such-thing')"], tmp_path / "words.log", 60
        )
