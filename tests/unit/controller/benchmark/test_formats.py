"""Workloads that other benchmarks write, and descriptions of synthetic ones."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.benchmark.formats import Entry, Synthetic, read_workload
from phalanx.controller.benchmark.jobs import plan
from phalanx.controller.benchmark.session import run_benchmark
from phalanx.controller.benchmark.settings import Settings
from phalanx.protos.errors import ConfigError

TRACE = [
    {"timestamp": 2000, "input_length": 30, "output_length": 2, "hash_ids": [7]},
    {"timestamp": 500, "input_length": 40, "output_length": 3, "hash_ids": [7]},
    {"timestamp": 1000, "input_length": 20, "output_length": 1, "hash_ids": [8]},
]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(items: list[Any], *, lines: bool = True) -> str:
        path = tmp_path / "workload.json"
        text = "\n".join(map(json.dumps, items)) if lines else json.dumps(items)
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize(
    ("item", "entry"),
    [
        (
            {"id": "x", "conversations": [{"from": "human", "value": "a b"}, {"value": "c"}, {}]},
            Entry(prompt="a b", output="c"),
        ),
        ({"prompt": "a b"}, Entry(prompt="a b", output=128)),
        ({"prompt": "a", "output_tokens": 9}, Entry(prompt="a", output=9)),
        ({"text": "a", "prompt_tokens": 3, "output_tokens_count": 9}, Entry(prompt="a", output=9)),
        ({"prompt_tokens": 3, "output_tokens": 9}, Entry(prompt=3, output=9)),
        (
            {"timestamp": 1500, "input_length": 600, "output_length": 9, "hash_ids": [4, 5]},
            Entry(prompt=600, output=9, time_s=1.5, blocks=(4, 5)),
        ),
    ],
)
def test_kinds(write: Callable[..., str], item: Any, entry: Entry, lines: bool) -> None:
    assert read_workload(write([item, item], lines=lines)) == [entry, entry]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([{"prompt": "a"}, {"prompt": ""}], "entry 2"),
        ([{"conversations": [{"value": "a"}]}], "entry 1"),
        ([{"conversations": {"value": "a"}}], "entry 1"),
        ([{"prompt_tokens": 0, "output_tokens": 1}], "entry 1"),
        ([{"prompt_tokens": True, "output_tokens": 1}], "entry 1"),
        ([{"input_length": 5, "output_length": 1, "timestamp": -1}], "entry 1"),
        ([{"input_length": 5, "output_length": 1, "hash_ids": ["a"]}], "entry 1"),
        ([{"input_length": 5}], "entry 1"),
        ([[1]], "entry 1"),
        ([], "holds no entry"),
        ([TRACE[0], {"prompt_tokens": 3, "output_tokens": 9}], "1 entries have a timestamp"),
    ],
)
def test_what_is_wrong_is_named(write: Callable[..., str], items: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_workload(write(items))


@pytest.mark.parametrize("text", ["nowhere.jsonl", "a=1", "prompt_tokens=9", "prompt_tokens=9,x=1"])
def test_what_is_neither_a_file_nor_a_description(text: str) -> None:
    with pytest.raises(ConfigError, match="workload"):
        read_workload(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_tokens": 0},
        {"prompt_tokens": "x"},
        {"prompt_tokens": 1.5},
        {"output_tokens_stdev": -1},
        {"prompt_tokens_min": 9, "prompt_tokens_max": 3},
        {"prompt_tokens": float("nan")},
    ],
)
def test_synthetic_lengths_that_are_none(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="workload: "):
        read_workload(json.dumps({"prompt_tokens": 5, "output_tokens": 5} | fields))


def test_synthetic_lengths_have_their_mean_and_spread() -> None:
    text = "prompt_tokens=200,prompt_tokens_stdev=20,prompt_tokens_max=230,output_tokens=8"
    found = read_workload(text)
    assert isinstance(found, Synthetic)
    entries = found.draw(2000, seed=1)
    prompts = [int(entry.prompt) for entry in entries]
    assert 195 < statistics.mean(prompts) < 203 and 14 < statistics.stdev(prompts) < 21
    assert max(prompts) == 230 and {entry.output for entry in entries} == {8}
    assert entries == found.draw(2000, seed=1) != found.draw(2000, seed=2)


def test_a_trace_is_sent_at_its_times(jump: Any, server: Any, write: Callable[..., str]) -> None:
    fake = server().parallel(9)
    settings = Settings(workload=write(TRACE), warmup=2, speed=2.0)
    outcome = jump(run_benchmark(fake, settings, lambda name, total: lambda item: None))
    began = min(item.due_s for item in outcome.attempts)
    due = sorted(item.due_s - began for item in outcome.attempts)
    assert due == pytest.approx([0.0, 0.25, 0.75])
    assert outcome.report["settings"]["mode"] == "trace"
    first, second, third = sorted((prompt for prompt, _ in fake.asked[2:]), key=len, reverse=True)
    assert first[:30] == second[:30] and second[:20] != third[:20]
    assert all(prompt[:20] not in (first[:20], third[:20]) for prompt, _ in fake.asked[:2])


def test_texts_are_sent_as_they_are(jump: Any, server: Any, write: Callable[..., str]) -> None:
    fake = server()
    turns = {"conversations": [{"value": "to be or"}, {"value": "not to"}]}
    settings = Settings(workload=write([turns]), requests=1, warmup=0)
    jump(run_benchmark(fake, settings, lambda name, total: lambda item: None))
    [(prompt, params)] = fake.asked
    assert prompt == [2, 2, 2] and params["max_tokens"] == 2


def test_what_does_not_fit_is_counted_and_a_rate_has_no_trace(
    jump: Any, server: Any, write: Callable[..., str]
) -> None:
    long = {"timestamp": 0, "input_length": 600, "output_length": 3}
    path = write([long, *TRACE])

    async def planned(settings: Settings) -> Any:
        return await plan(fake, settings, await fake.model_info())

    fake = server()
    made = jump(planned(Settings(workload=path, requests=2)))
    assert (made.skipped, len(made.measured)) == (1, 2)
    with pytest.raises(ConfigError, match="rate is 3"):
        jump(planned(Settings(workload=path, rate=3)))
    with pytest.raises(ConfigError, match="none of whose 1 entries fits"):
        jump(planned(Settings(workload=write([long]))))
    with pytest.raises(ConfigError, match="lengths and workload"):
        Settings(workload="a", lengths="b")
    with pytest.raises(ConfigError, match="speed is 0"):
        Settings(speed=0)
