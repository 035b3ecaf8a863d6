"""Layouts of a cluster's benchmark, what their figures amount to, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from phalanx.controller.benchmark.cluster_report import cluster_report, write_folder
from phalanx.controller.benchmark.layouts import Layout, Run, scaling
from phalanx.controller.benchmark.session import run_benchmark
from phalanx.controller.benchmark.settings import Settings
from phalanx.controller.cli import app
from phalanx.controller.cluster.ray_links import Link, Node
from phalanx.protos.errors import ConfigError


def test_a_layout_is_read() -> None:
    layout = Layout.parse("tp=2, replicas=3,placement=SPREAD")
    assert layout.ranks == 6 and layout.name == "tp=2,replicas=3,placement=SPREAD"
    assert layout.flags == ["--tp", "2", "--replicas", "3", "--placement", "SPREAD"]
    assert Layout.parse("pp=2").ranks == 2


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=", "tp=0", "tp=-1", "tp=x", "model=a", "tp=1,tp=2", "tp=1;pp=2"]
)
def test_a_wrong_layout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="layout is"):
        Layout.parse(text)


def run(text: str, rate: float | None) -> Run:
    report = None if rate is None else {"results": {"output_tokens_per_s": rate}}
    return Run(layout=Layout.parse(text), report=report)


def test_efficiency_is_of_each_rank_beside_the_first_that_was_measured() -> None:
    found = scaling([run("tp=8", None), run("tp=2", 100.0), run("tp=2,pp=2", 150.0)])
    assert [(item.speedup, item.efficiency) for item in found] == [
        (None, None),
        (1.0, 1.0),
        (1.5, 0.75),
    ]
    assert [item.speedup for item in scaling([run("tp=2", 0.0)])] == [None]


def test_the_report_is_whole_and_says_what_failed(jump: Any, server: Any, tmp_path: Path) -> None:
    settings = Settings(requests=4, concurrency=2, prompt_tokens="4", output_tokens="3")
    runs = []
    for text, slots in (("tp=1", 1), ("tp=2", 2)):
        outcome = jump(
            run_benchmark(server().parallel(slots), settings, lambda *_: lambda item: None)
        )
        runs.append(Run(layout=Layout.parse(text), report=outcome.report))
    runs.append(Run(layout=Layout.parse("tp=9"), report=None, error="<no> room | for it"))
    nodes = [{"node_id": "n", "name": "a", "address": "10.0.0.1", "cpus": 2, "gpus": 0}]
    link = {"first": "10.0.0.1", "second": "10.0.0.2", "collectives": "gloo", "bytes": 2048}
    links = [link | {"seconds": 0.001, "bytes_per_s": 2.048e6}]
    shown = {"workload": None, "prompt_tokens": "4", "output_tokens": "3", "concurrency": 2}
    report = cluster_report("tiny", shown | {"rate": None, "requests": 4}, nodes, links, runs)
    write_folder(tmp_path, report)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert [item["speedup"] for item in kept["layouts"]] == [1.0, pytest.approx(2.0), None]
    assert [item["efficiency"] for item in kept["layouts"]] == [1.0, pytest.approx(1.0), None]
    text = (tmp_path / "report.md").read_text()
    assert "| tp=2 | 2 | 3.0 | 2.00 | 100% |" in text and "no> room / for it" in text
    assert "| 10.0.0.1 - 10.0.0.2 | gloo | 2 KiB | 1000.0 | 0.002 |" in text
    page = (tmp_path / "report.html").read_text()
    assert "&lt;no&gt; room | for it" in page and page.count("data:image/png") == 2
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_measures_links_and_every_layout(
    jump: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    served: list[list[str]] = []

    @contextmanager
    def serve(model: str, flags: list[str]) -> Any:
        served.append(flags)
        if "9" in flags:
            from phalanx.protos.errors import PhalanxError

            raise PhalanxError("it has 2 CPU")
        yield "127.0.0.1:1"

    async def measure(connection: Any, settings: Settings, *, title: str) -> Any:
        return await run_benchmark(server(), settings, lambda *_: lambda item: None)

    node = Node(node_id="n", name="a", address="10.0.0.1", cpus=2, gpus=0)
    link = Link(first="10.0.0.1", second="10.0.0.1", collectives="shm", bytes=1024, seconds=1e-5)
    monkeypatch.setattr("phalanx.controller.benchmark.served.served", serve)
    monkeypatch.setattr("phalanx.controller.commands.cluster.measure", measure)
    monkeypatch.setattr("phalanx.controller.commands.cluster.asyncio.run", jump)
    monkeypatch.setattr(
        "phalanx.controller.cluster.ray_links.measure_links",
        lambda address, device, sizes, progress: ([node], [link]),
    )
    words = ["bench", "cluster", "smollm2", "--layout", "tp=2", "--layout", "tp=9"]
    words += ["--requests", "2", "--warmup", "0", "--output", str(tmp_path / "out")]
    words += ["--kv-tokens", "64", "--prompt-tokens", "4", "--output-tokens", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1, done.output  # a layout failed
    assert served == [["--kv-tokens", "64", "--tp", "2"], ["--kv-tokens", "64", "--tp", "9"]]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [item["error"] for item in report["layouts"]] == ["", "it has 2 CPU"]
    assert report["nodes"][0]["cpus"] == 2 and report["links"][0]["bytes_per_s"] == pytest.approx(
        1.024e8
    )


@pytest.mark.parametrize("layout", ["tp=0", "placement=ROUND", "threads=x"])
def test_a_wrong_layout_ends_the_command_before_anything_starts(layout: str) -> None:
    done = CliRunner().invoke(app, ["bench", "cluster", "smollm2", "--layout", layout])
    assert done.exit_code == 2 and "error: " in done.output
