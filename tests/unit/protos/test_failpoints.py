"""Failpoints: off unless asked for, refused where people are served, and doing what they say."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phalanx.protos.errors import ConfigError
from phalanx.protos.failpoints import FLAG, POINTS, PRODUCTION, Failpoints, failpoints

ROOT = Path(__file__).parents[3]


def test_off_without_the_flag() -> None:
    assert failpoints(environment={}) is None
    assert failpoints(environment={FLAG: ""}) is None


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=FLAG):
        failpoints(environment={FLAG: str(tmp_path / "none")})
    assert isinstance(failpoints(environment={FLAG: str(tmp_path)}), Failpoints)


def test_an_installation_for_production_refuses_to_start(tmp_path: Path) -> None:
    """The command that the images run, in an installation that has their mark."""
    (tmp_path / PRODUCTION).touch()
    script = (
        f"import sys; sys.prefix = {str(tmp_path)!r}\n"
        "from phalanx.controller.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, "serve", "smollm2", "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {FLAG: str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {FLAG} is set, allowed: not in an installation for production\n"


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_images_have_the_mark(name: str) -> None:
    """In the virtual environment that is copied to the last stage."""
    text = (ROOT / "deploy" / name).read_text(encoding="utf-8")
    [prefix] = re.findall(r"-m venv (\S+)", text)
    assert f"touch {prefix}/{PRODUCTION}" in text
    assert f"COPY --from=build {prefix} {prefix}" in text


def test_a_point_fires_at_its_time_and_once(tmp_path: Path) -> None:
    points, other = Failpoints(tmp_path), Failpoints(tmp_path)
    points.hit("step")
    (tmp_path / "step").write_text('{"action": "raise", "after": 3}')
    points.hit("step")
    points.hit("step")
    with pytest.raises(RuntimeError, match="failpoint step"):
        points.hit("step")
    for _ in range(3):
        points.hit("step")
        other.hit("step")
    assert [path.name for path in tmp_path.iterdir()] == ["step.fired"]


def test_a_point_may_stay_and_may_be_of_one_rank(tmp_path: Path) -> None:
    (tmp_path / "step").write_text('{"action": "raise", "stays": true, "rank": 1}')
    for _ in range(2):
        Failpoints(tmp_path, rank=0).hit("step")
        with pytest.raises(RuntimeError):
            Failpoints(tmp_path, rank=1).hit("step")
    assert (tmp_path / "step.fired").exists()


def test_a_point_kills(tmp_path: Path) -> None:
    (tmp_path / "step").write_text('{"action": "kill"}')
    script = "from phalanx.protos.failpoints import failpoints; failpoints().hit('step')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], check=False, env=os.environ | {FLAG: str(tmp_path)}
    )
    assert done.returncode == -9


def test_holding_stops_every_thread(tmp_path: Path) -> None:
    """One that counts does not get on; while the point only waits, it does."""
    script = """
import sys, threading, time
from phalanx.protos.failpoints import failpoints
count, over = 0, False
def run():
    global count
    while not over:
        count += 1
        time.sleep(0.001)
thread = threading.Thread(target=run)
thread.start()
before = count
failpoints().hit("step")
print(count - before)
over = True
"""
    counts = {}
    for action in ("hold", "wait"):
        (tmp_path / "step").write_text(f'{{"action": "{action}", "seconds": 1}}')
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", "-c", script],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {FLAG: str(tmp_path)},
        )
        assert time.monotonic() - began > 1
        counts[action] = int(done.stdout)
    assert counts["hold"] <= 2 < counts["wait"]


def test_every_point_is_somewhere_and_asked_for_at_construction_alone() -> None:
    """`hit` is called in the failing classes, and nowhere else."""
    hits: dict[str, set[str]] = {}
    for path in [*ROOT.glob("controller/**/*.py"), *ROOT.glob("workers/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("points.hit"):
                hits.setdefault(path.name, set()).add(ast.literal_eval(node.args[0]))
    assert set(hits) == {"failing.py"}
    assert hits["failing.py"] == set(POINTS)
