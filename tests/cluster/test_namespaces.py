"""`phalanx bench cluster` over two nodes: network namespaces of this machine, joined by a cable."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RAY = [sys.executable, "-P", "-m", "ray.scripts.scripts"]
PHALANX = [sys.executable, "-P", "-m", "phalanx.controller"]


@dataclass(frozen=True)
class Namespaces:
    """Two nodes; `run` runs a command in one of them."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    environment: dict[str, str]

    def command(self, index: int, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[index], *words]

    def run(self, index: int, words: list[str], timeout: float = 120) -> str:
        done = subprocess.run(
            self.command(index, words),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.environment,
        )
        assert done.returncode == 0, (words, done.stdout[-4000:], done.stderr[-4000:])
        return done.stdout


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    """Two network namespaces that reach each other and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    mark = secrets.token_hex(3)
    names = (f"phx-a-{mark}", f"phx-b-{mark}")
    addresses = ("10.231.77.1", "10.231.77.2")
    ends = (f"phxa{mark}", f"phxb{mark}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    made: list[str] = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace could be made: {error.stderr.decode().strip()}")
            made.append(name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
            own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            own |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
            yield Namespaces(names, addresses, own)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def ray_nodes(namespaces: Namespaces) -> Iterator[str]:
    """A Ray node of two cores in each namespace; yields the address of the first."""
    head, worker = namespaces.addresses
    address = f"{head}:6379"
    common = ["--num-cpus", "2", "--object-store-memory", str(80 * 2**20), "--block"]
    commands = [
        ["start", "--head", "--port", "6379", "--include-dashboard", "false"],
        ["start", "--address", address],
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for index, words in enumerate(commands):
            place = ["--node-ip-address", (head, worker)[index], *common]
            running.append(
                subprocess.Popen(
                    namespaces.command(index, [*RAY, *words, *place]),
                    env=namespaces.environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            namespaces.run(0, [sys.executable, "-P", "-c", WAIT, address, str(index + 1)], 240)
        yield address
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


WAIT = """
import sys, time
import ray
for _ in range(60):
    try:
        ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
        break
    except Exception as error:
        time.sleep(1)
else:
    raise SystemExit(f"no cluster: {error}")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.5)
"""


def test_layouts_over_two_nodes(
    namespaces: Namespaces, ray_nodes: str, tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 50 * at, "input_length": 12 + at, "output_length": 6, "hash_ids": [at % 2]}
        for at in range(6)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["bench", "cluster", str(tiny_llama()), "--ray-address", ray_nodes]
    for layout in ("tp=1", "tp=2,placement=STRICT_SPREAD", "pp=2", "tp=1,replicas=2"):
        words += ["--layout", layout]
    words += ["--kv-tokens", "1024", "--workload", str(trace), "--warmup", "1", "--seed", "3"]
    words += ["--output", str(tmp_path / "out")]
    said = namespaces.run(0, [*PHALANX, *words], 600)
    report: dict[str, Any] = json.loads((tmp_path / "out/report.json").read_text())
    first, second = namespaces.addresses
    assert [node["address"] for node in report["nodes"]] == [first, second]
    links = {(link["first"], link["second"], link["collectives"]) for link in report["links"]}
    assert links == {(first, first, "shm"), (second, second, "shm"), (first, second, "gloo")}
    across = [link for link in report["links"] if link["first"] != link["second"]]
    assert len(across) == 5 and all(link["seconds"] > 0 for link in across)
    assert across[0]["seconds"] < across[-1]["seconds"]
    assert across[0]["bytes_per_s"] < across[-1]["bytes_per_s"]
    for item in report["layouts"]:
        assert item["error"] == "" and item["mode"] == "trace"
        assert item["results"]["completed"] == 6 and item["results"]["failed"] == 0
        ranks = [rank for replica in item["cluster"]["replicas"] for rank in replica["ranks"]]
        assert len(ranks) == item["ranks"]
    assert [item["ranks"] for item in report["layouts"]] == [1, 2, 2, 2]
    base, tensor, *_ = report["layouts"]
    assert base["efficiency"] == 1.0 and tensor["efficiency"] == tensor["speedup"] / 2
    assert "tp=2,placement=STRICT_SPREAD" in said and "GB/s" in said
    html = (tmp_path / "out/report.html").read_text()
    assert html.count("data:image/png;base64,") == 2 and first in html
    assert "![Layouts](layouts.png)" in (tmp_path / "out/report.md").read_text()
