"""What an installed copy holds: every package, the contract, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOMS = ("controller", "kernels", "protos", "workers")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "build", "*.egg-info")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, unpacked; built from a copy, so that the working tree stays as it is, and without a
    compiler, which is quick and which users may lack."""
    source, built, unpacked = (tmp_path_factory.mktemp(name) for name in ("tree", "built", "wheel"))
    for room in ROOMS:
        shutil.copytree(root / room, source / room, ignore=SKIPPED)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(root / name, source / name)
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(built), str(source)]
    without = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without)
    assert done.returncode == 0, done.stderr
    (archive,) = built.glob("*.whl")
    zipfile.ZipFile(archive).extractall(unpacked)
    return unpacked


def test_every_folder_of_code_is_a_package(root: Path) -> None:
    folders = {path.parent for room in ROOMS for path in (root / room).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_every_package_is_listed(root: Path, project: dict[str, Any]) -> None:
    """A package left out works from the tree and is missing from the wheel, without a word."""
    found = {
        "phalanx." + str(path.parent.relative_to(root)).replace("/", ".")
        for room in ROOMS
        for path in (root / room).rglob("__init__.py")
    }
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)
    assert project["tool"]["setuptools"]["package-dir"] == {
        f"phalanx.{room}": room for room in ROOMS
    }


def test_every_room_is_typed(root: Path) -> None:
    assert [room for room in ROOMS if not (root / room / "py.typed").exists()] == []


def test_generated_code_is_fresh(root: Path, tmp_path: Path) -> None:
    from phalanx.protos.generate import generate

    generate(tmp_path)
    folder = root / "protos"
    kept = {
        path.relative_to(folder): path.read_bytes()
        for pattern in ("*_pb2.py", "*_pb2_grpc.py", "*.pyi")
        for path in folder.rglob(pattern)
    }
    made = {
        path.relative_to(tmp_path): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert made == kept != {}


def test_the_wheel_holds_the_rooms(root: Path, wheel: Path) -> None:
    patterns = ("*.py", "*.proto", "*.pyi", "py.typed", "*.json", "*.cpp", "*.h", "*.inl")
    patterns += ("*.html", "*.css", "*.js", "*.svg")
    wanted = {
        str(path.relative_to(root))
        for room in ROOMS
        for pattern in patterns
        for path in (root / room).rglob(pattern)
    }
    inside = {
        str(path.relative_to(wheel / "phalanx"))
        for path in (wheel / "phalanx").rglob("*")
        if path.is_file()
    }
    assert wanted - inside == set()
    assert {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")} == {
        "phalanx"
    }
    assert {path.name for path in (wheel / "phalanx").iterdir()} == set(ROOMS)


def test_the_wheel_runs_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    script = (
        "import phalanx.controller.cli as cli, sys\n"
        "sys.argv = ['phalanx', 'plan', '--help']\n"
        "print(cli.__file__)\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(wheel)) and "--memory-per-rank" in done.stdout


def test_extras_and_the_tested_torch_agree(project: dict[str, Any]) -> None:
    """The demo and the tests run the same torch, so the demo is what was tested."""
    extras = project["project"]["optional-dependencies"]
    pinned = [
        [item for item in extras[name] if item.startswith("torch==")] for name in ("demo", "dev")
    ]
    assert pinned[0] == pinned[1] != []
