"""Who may import whom. The table of README.md's import rules, executed."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOMS = {
    "protos": set[str](),
    "kernels": set[str](),
    "workers": {"protos", "kernels"},
    "controller": {"protos"},
}
SEAMS = {
    ("controller/cluster/ray_fleet.py", "phalanx.workers.actor"),
    ("controller/model.py", "phalanx.workers.checkpoint"),
    ("controller/model.py", "phalanx.workers.models"),
}
"""(file, package): the places where the controller looks past the contract."""

PACKAGES = {
    "protos": {"google", "grpc", "llguidance", "msgspec"},
    "kernels": {"numpy", "torch", "triton"},
    "workers": {"gguf", "msgspec", "numpy", "psutil", "safetensors", "torch"},
    "controller": {
        "google",
        "grpc",
        "grpc_health",
        "grpc_reflection",
        "grpc_status",
        "jinja2",
        "msgspec",
        "numpy",
        "prometheus_client",
        "psutil",
        "rich",
        "tokenizers",
        "typer",
    },
}
NARROWER = {
    "ray": ("controller/cluster/", "workers/actor.py"),
    "matplotlib": (
        "controller/benchmark/cluster_report.py",
        "controller/benchmark/report.py",
        "controller/simulation/report.py",
    ),
    "aiohttp": ("controller/openai/", "controller/page/host.py"),
    "opentelemetry": (
        "controller/tracing/setup.py",
        "controller/tracing/spans.py",
        "workers/tracing.py",
    ),
    "llguidance": ("protos/grammars.py",),
    "smg_grpc_proto": ("controller/vllm/service.py",),
}
"""Packages that only these files and folders use."""

WITHOUT_TORCH = ("workers/checkpoint/", "workers/models/")
INNER = {
    "controller/kvcache/": set[str](),
    "controller/scheduling/": {"kvcache", "tenants"},
    "controller/benchmark/": {"client"},
}
"""Which neighbours these folders of the controller may import."""


def imported(path: str, tree: ast.Module) -> Iterator[str]:
    """Absolute names of everything that a module imports, at its top or inside a function."""
    package = "phalanx." + path.rpartition("/")[0].replace("/", ".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level > 1:
                yield "." * node.level + module
            elif module:
                yield f"{package}.{module}" if node.level else module
            else:
                yield from (f"{package}.{alias.name}" for alias in node.names)


def refusals(path: str, tree: ast.Module) -> list[str]:
    """Every import of the module that the rules forbid."""
    room = path.partition("/")[0]
    return [
        f"{path} imports {name}: {reason}"
        for name in imported(path, tree)
        if (reason := _reason(path, room, name))
    ]


def _reason(path: str, room: str, name: str) -> str | None:
    if name.startswith("."):
        return "relative imports reach siblings only"
    top, _, rest = name.partition(".")
    if top == "phalanx":
        return _room_reason(path, room, name, rest)
    if top in (*ROOMS, "tests"):
        return "rooms are imported as phalanx.*, tests not at all"
    if top in sys.stdlib_module_names:
        return None
    if top == "torch" and path.startswith(WITHOUT_TORCH):
        return "the controller reads this without torch"
    if top in NARROWER:
        return None if path.startswith(NARROWER[top]) else f"{top} has its own place"
    return None if top in PACKAGES[room] else f"{room} may not use {top}"


def _room_reason(path: str, room: str, name: str, rest: str) -> str | None:
    target, _, inner = rest.partition(".")
    if target != room:
        seam = any(path == file and f"{name}.".startswith(f"{to}.") for file, to in SEAMS)
        return None if seam or target in ROOMS[room] else f"{room} may not import {target}"
    if inner.startswith("commands") and not path.startswith("controller/commands/"):
        return None if path == "controller/cli.py" else "only cli.py imports commands"
    for folder, allowed in INNER.items():
        neighbour = inner.partition(".")[0]
        if path.startswith(folder) and neighbour not in (folder.split("/")[1], *allowed):
            return f"{folder} may not import its neighbour {neighbour}"
    return None


def test_every_import_is_allowed(modules: list[Any]) -> None:
    found = [text for module in modules for text in refusals(module.path, module.tree)]
    assert found == []


def test_every_seam_is_used(modules: list[Any]) -> None:
    """A seam that nobody uses is a hole in the wall."""
    uses = [
        (module.path, name) for module in modules for name in imported(module.path, module.tree)
    ]
    unused = {
        seam
        for seam in SEAMS
        if not any(path == seam[0] and f"{name}.".startswith(f"{seam[1]}.") for path, name in uses)
    }
    assert unused == set()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/select.py", "import phalanx.workers.engine"),
        ("kernels/select.py", "from phalanx.protos.steps import StepPlan"),
        ("kernels/select.py", "def late():\n    import ray"),
        ("protos/steps.py", "import torch"),
        ("workers/engine.py", "from phalanx.controller.config import ClusterConfig"),
        ("workers/engine.py", "import ray"),
        ("workers/engine.py", "from ..controller import config"),
        ("workers/models/llama.py", "import torch.nn"),
        ("controller/app.py", "import torch"),
        ("controller/app.py", "from phalanx.workers.actor import WorkerActor"),
        ("controller/cluster/ray_fleet.py", "from phalanx.workers.engine import Engine"),
        ("controller/model.py", "import phalanx.workers.checkpoint_tools"),
        ("controller/replica.py", "import kernels"),
        ("controller/replica.py", "import tests.conftest"),
        ("controller/replica.py", "import ray"),
        ("controller/replica.py", "import requests"),
        ("controller/replica.py", "from .commands.flags import given"),
        ("controller/kvcache/manager.py", "from phalanx.controller.scheduling import request"),
        ("controller/benchmark/load.py", "from phalanx.controller.engine import AsyncEngine"),
    ],
)
def test_a_planted_import_is_refused(path: str, source: str) -> None:
    assert len(refusals(path, ast.parse(source))) == 1


def test_the_controller_never_loads_torch(modules: list[Any], root: Path) -> None:
    """Also not through what it imports: the process that decides starts fast and stays small."""
    names = [
        "phalanx." + module.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for module in modules
        if module.room == "controller" and not module.path.endswith("__main__.py")
    ]
    script = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    assert _loaded(script, root) & {"torch", "transformers"} == set()


def test_the_command_line_starts_light(root: Path) -> None:
    """`phalanx --help` waits for no engine, no RPC stack and no numbers."""
    heavy = {"torch", "ray", "grpc", "numpy", "tokenizers", "matplotlib"}
    assert _loaded("import phalanx.controller.cli, sys\n", root) & heavy == set()


def _loaded(script: str, root: Path) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the script."""
    script += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("name", ROOMS)
def test_the_repository_is_not_importable_by_folder_name(name: str, root: Path) -> None:
    """A `kernels` of ours on the path would hide the package of that name from transformers."""
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
    assert not [place for place in places if place and Path(place).is_relative_to(root)]
