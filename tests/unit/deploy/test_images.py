"""The Dockerfiles: what they copy exists, what they install is declared, what they end as."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

NAMES = ("Dockerfile", "Dockerfile.cpu")
BUILD_TOOLS = {"build-essential", "gcc", "g++", "make", "cmake", "git", "curl", "wget"}
ALLOWED_TOOLS: dict[str, set[str]] = {"Dockerfile": {"gcc"}, "Dockerfile.cpu": set()}

Stages = list[list[dict[str, Any]]]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def text(deploy: Path, name: str) -> str:
    return (deploy / name).read_text(encoding="utf-8")


@pytest.fixture
def stages(text: str, tmp_path: Path) -> Stages:
    """Instructions by stage; what comes before the first FROM is in the first."""
    parser = DockerfileParser(path=str(tmp_path))
    parser.content = text
    found: Stages = [[]]
    for item in parser.structure:
        if item["instruction"] == "FROM" and any(old["instruction"] == "FROM" for old in found[-1]):
            found.append([])
        if item["instruction"] != "COMMENT":
            found[-1].append(item)
    return found


def values(stage: list[dict[str, Any]], instruction: str) -> list[str]:
    return [item["value"] for item in stage if item["instruction"] == instruction]


def copied(stage: list[dict[str, Any]]) -> list[str]:
    """Sources that a stage takes from the build context."""
    lines = [line.split() for line in values(stage, "COPY") if "--from=" not in line]
    return [source for line in lines for source in line[:-1]]


def test_two_stages_on_one_pinned_base(stages: Stages, text: str) -> None:
    assert len(stages) == 2
    assert re.findall(r"^ARG PYTHON=(.+)$", text, re.MULTILINE) == ["3.11.14-slim-bookworm"]
    assert [values(stage, "FROM")[0].split()[0] for stage in stages] == ["python:${PYTHON}"] * 2
    assert copied(stages[1]) == []  # the last stage takes only what the first has built


def test_no_build_tools_at_the_end(stages: Stages, name: str) -> None:
    """But the C compiler that Triton calls at run time."""
    commands = " ".join(values(stages[1], "RUN"))
    assert "pip" not in commands.split()
    assert BUILD_TOOLS & set(commands.split()) == ALLOWED_TOOLS[name]


def test_ends_as_a_user_without_rights(stages: Stages) -> None:
    last = stages[1]
    [user] = values(last, "USER")
    assert re.fullmatch(r"([1-9]\d+):\1", user)
    order = [item["instruction"] for item in last]
    assert order.index("USER") > max(i for i, item in enumerate(order) if item == "RUN")
    environment = " ".join(values(last, "ENV"))
    assert "PYTHONSAFEPATH=1" in environment and "HOME=/tmp" in environment
    assert values(last, "VOLUME") == ['["/tmp"]']


def test_runs_our_command_and_our_probe(stages: Stages, deploy: Path) -> None:
    last = stages[1]
    assert json.loads(values(last, "ENTRYPOINT")[0]) == ["phalanx"]
    assert json.loads(values(last, "CMD")[0]) == ["serve", "--config", "/etc/phalanx/config.toml"]
    [probe] = values(last, "HEALTHCHECK")
    command = json.loads(probe.split("CMD", 1)[1])
    assert command == ["python", "/opt/phalanx/healthcheck.py"]
    assert "deploy/healthcheck.py" in copied(stages[0])
    labels = " ".join(values(last, "LABEL"))
    assert all(f"image.{word}=" in labels for word in ("title", "version", "licenses"))


def visible(ignore: Path, source: str) -> bool:
    """Whether an ignore file that begins with * lets a top path through."""
    patterns = ignore.read_text(encoding="utf-8").split()
    assert patterns[0] == "*"
    return any(source == item[1:] for item in patterns if item.startswith("!"))


def test_copies_what_exists(stages: Stages, root: Path, deploy: Path, name: str) -> None:
    sources = copied(stages[0])
    assert len(sources) == 7
    for source in sources:
        assert (root / source).exists(), source
        assert visible(deploy / f"{name}.dockerignore", source), source


def test_copies_what_the_build_needs(stages: Stages, root: Path) -> None:
    """Every folder that the package is mapped onto, and its description."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folders = settings["tool"]["setuptools"]["package-dir"].values()
    assert {*folders, settings["project"]["readme"], "pyproject.toml"} <= set(copied(stages[0]))


def test_both_images_are_built_alike(deploy: Path) -> None:
    """They differ in what they install, not in what they copy or how they run."""
    parts = []
    for name in NAMES:
        lines = (deploy / name).read_text(encoding="utf-8").split("\n")
        kept = ("COPY", "ENTRYPOINT", "CMD", "USER", "VOLUME", "EXPOSE", "WORKDIR", "STOPSIGNAL")
        parts.append([line for line in lines if line.startswith(kept)])
    assert parts[0] == parts[1]
    ignores = [(deploy / f"{name}.dockerignore").read_text(encoding="utf-8") for name in NAMES]
    assert ignores[0] == ignores[1]


def test_installs_what_the_project_declares(text: str, root: Path, name: str) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"\[([a-z]+)\]\"", text)
    assert extras == (["gpu"] if name == "Dockerfile" else [])
    assert set(extras) <= set(project["optional-dependencies"])
    pinned = dict(re.findall(r"^ARG (\w+)_VERSION=(.+)$", text, re.MULTILINE))
    needs = {item.name: item for item in map(Requirement, project["dependencies"])}
    assert set(pinned) == {"TORCH", "RAY"}
    for package, version in pinned.items():
        assert version in needs[package.lower()].specifier, package


def test_the_demo_model_is_that_of_the_makefile(root: Path, deploy: Path) -> None:
    pattern = r"^(?:ARG DEMO_MODEL=|MODEL_PACKAGE := )(.+)$"
    texts = [(deploy / "Dockerfile.cpu").read_text(), (root / "Makefile").read_text()]
    found = [re.findall(pattern, text, re.MULTILINE) for text in texts]
    assert found[0] == found[1] != []


def test_compose_runs_the_image_hardened(deploy: Path) -> None:
    compose = yaml.safe_load((deploy / "compose.yaml").read_text(encoding="utf-8"))
    service = compose["services"]["phalanx"]
    assert (
        (deploy / service["build"]["context"] / service["build"]["dockerfile"]).resolve().exists()
    )
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["init"]
    for name, other in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in other["ports"]), name
        for volume in other.get("volumes", []):
            source = volume.split(":")[0]
            assert (
                source in compose["volumes"]
                if not source.startswith("./")
                else (deploy / source).exists()
            ), volume
    for config in compose["configs"].values():
        assert (deploy / config["file"]).exists()
