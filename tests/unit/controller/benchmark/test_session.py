"""A whole benchmark against a server that jumps through time, and its reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.benchmark.load import Attempt
from phalanx.controller.benchmark.report import (
    check_writable,
    times_table,
    totals_text,
    write_plot,
    write_report,
)
from phalanx.controller.benchmark.session import Outcome, run_benchmark
from phalanx.controller.benchmark.settings import Settings
from phalanx.protos.errors import ConfigError, PhalanxError, Unavailable

Jump = Callable[[Any], Any]
Server = Callable[..., Any]


def silent(name: str, total: int) -> Callable[[Attempt], None]:
    return lambda item: None


@pytest.fixture
def outcome(jump: Jump, server: Server) -> Outcome:
    """Six requests, two at a time, of which the last one fails."""
    fake = server().parallel(2)
    fake.fail = lambda number: Unavailable("draining") if number == 7 else None
    settings = Settings(requests=6, concurrency=2, prompt_tokens="4-9", output_tokens="3")
    result: Outcome = jump(run_benchmark(fake, settings, silent))
    return result


def test_warm_up_requests_are_sent_first_and_not_counted(jump: Jump, server: Server) -> None:
    fake = server().parallel(2)
    stages: list[tuple[str, int, list[Attempt]]] = []

    def stage(name: str, total: int) -> Callable[[Attempt], None]:
        stages.append((name, total, []))
        return stages[-1][2].append

    settings = Settings(requests=6, concurrency=2, warmup=3, output_tokens="2")
    outcome = jump(run_benchmark(fake, settings, stage))
    assert [(name, total, len(ended)) for name, total, ended in stages] == [
        ("warm-up", 3, 3),
        ("measuring", 6, 6),
    ]
    assert outcome.attempts == stages[1][2]
    assert len(fake.asked) == 9 and outcome.results.sent == 6
    assert min(item.due_s for item in outcome.attempts) >= max(i.end_s for i in stages[0][2])


def test_what_is_asked_of_the_server(jump: Jump, server: Server) -> None:
    fake = server()
    settings = Settings(
        requests=5, concurrency=1, prompt_tokens="10-20", output_tokens="1-4", temperature=0.5
    )
    jump(run_benchmark(fake, settings, silent))
    for prompt, params in fake.asked:
        assert 10 <= len(prompt) <= 20 and not {2, 3} & set(prompt)
        assert 1 <= params["max_tokens"] <= 4
        assert params["ignore_eos"] is True and params["temperature"] == 0.5


def test_a_rate_makes_the_loop_open(jump: Jump, server: Server) -> None:
    fake = server(first_s=50.0)
    settings = Settings(requests=10, concurrency=1, rate=2.0, warmup=0)
    outcome = jump(run_benchmark(fake, settings, silent))
    assert fake.most_open == 10
    assert outcome.report["settings"]["mode"] == "open"


def test_recorded_lengths(jump: Jump, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    talk = {"conversations": [{"value": "one two three"}, {"value": "four five"}]}
    rows = [{"prompt_tokens": 500, "output_tokens": 13}, talk]
    file.write_text("\n".join(map(json.dumps, rows)))
    fake = server()
    settings = Settings(requests=3, concurrency=1, warmup=0, lengths=str(file))
    outcome = jump(run_benchmark(fake, settings, silent))
    # 513 tokens do not fit a context of 512; the conversation has three words and two
    assert [(len(prompt), params["max_tokens"]) for prompt, params in fake.asked] == [(3, 2)] * 3
    assert outcome.report["skipped_too_long"] == 1


def test_lengths_beyond_the_context_are_refused(jump: Jump, server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="come to 513, allowed together: 512"):
        jump(run_benchmark(server(), Settings(prompt_tokens="449"), silent))
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt_tokens": 512, "output_tokens": 1}')
    with pytest.raises(ConfigError, match="none of whose 1 entries fits"):
        jump(run_benchmark(server(), Settings(lengths=str(file)), silent))


def test_a_failed_warm_up_ends_it(jump: Jump, server: Server) -> None:
    fake = server()
    fake.fail = lambda number: Unavailable("draining") if number == 0 else None
    with pytest.raises(PhalanxError, match="1 of 8 warm-up .* UNAVAILABLE: draining"):
        jump(run_benchmark(fake, Settings(), silent))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests": 0}, "requests is 0, allowed: at least 1"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"rate": 0.0}, "rate is 0, allowed: above 0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"output_tokens": "many"}, "output_tokens is 'many'"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**fields)


def test_the_report_can_be_read_back_and_recomputed(outcome: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_report(path, outcome.report)
    report = json.loads(path.read_text())
    assert report["settings"] | {"requests": 6, "prompt_tokens": "4-9"} == report["settings"]
    assert report["model"]["name"] == "tiny"
    (replica,) = report["cluster"]["replicas"]
    assert (replica["state"], replica["steps"]) == ("ready", 0)
    assert report["model"]["eos_token_ids"] == [2, 3]
    assert report["client_machine"]["cores"] >= 1
    assert report["client_versions"]["python"].startswith("3.")
    assert report["date"].endswith("+00:00")
    rows, results = report["requests"], report["results"]
    assert len(rows) == 6 and results["failed"] == 1
    assert results["statuses"] == {"OK": 5, "UNAVAILABLE": 1}
    good = [row for row in rows if row["status"] == "OK"]
    assert sum(row["output_tokens"] for row in good) == results["output_tokens"] == 15
    end = max(row["due_s"] + row["latency_s"] for row in rows)
    assert results["duration_s"] == pytest.approx(end)
    assert results["output_tokens_per_s"] == pytest.approx(15 / end)


def test_the_texts_hide_no_failure(outcome: Outcome) -> None:
    text = totals_text(outcome.results)
    assert "5 of 6 requests completed" in text
    assert "1 failed with UNAVAILABLE, such as: draining" in text


def test_the_table_is_in_milliseconds(outcome: Outcome) -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(times_table(outcome.results))
    line = next(row for row in capture.get().splitlines() if "time to first token" in row)
    assert "1000.0" in line


def test_the_plot_is_a_png(outcome: Outcome, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    write_plot(path, outcome.attempts, "tiny")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_plot_of_failures_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    failed = Attempt(0.0, 0.0, 5, 5, end_s=1.0, status="UNAVAILABLE")
    write_plot(tmp_path / "plot.png", [failed], "tiny")
    assert (tmp_path / "plot.png").exists()


def test_without_matplotlib_it_says_what_to_install(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'phalanx\[bench\]'"):
        write_plot(tmp_path / "plot.png", outcome.attempts, "tiny")


def test_targets_are_checked_beforehand(tmp_path: Path) -> None:
    check_writable("output", tmp_path / "report.json")
    for path in (tmp_path, tmp_path / "missing" / "report.json"):
        with pytest.raises(ConfigError, match="output is .* a folder that exists"):
            check_writable("output", path)
