"""The runbook's commands name files, objects and options that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.server.security import TokenTable


@pytest.fixture(scope="module")
def runbook(deploy: Path) -> str:
    return (deploy / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def commands(runbook: str) -> list[list[str]]:
    """The words of every command, pipes taken apart."""
    blocks = re.findall(r"^```console\n(.*?)^```", runbook, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines)
    parts = [part for line in lines for part in line[2:].split(" | ")]
    return [shlex.split(part, posix=False) for part in parts]


def test_files_exist(commands: list[list[str]], root: Path) -> None:
    named = {word for words in commands for word in words if word.startswith("deploy/")}
    assert len(named) >= 5
    assert {path for path in named if not (root / path).exists()} == set()


def test_objects_exist(commands: list[list[str]], manifests: Any) -> None:
    """Of the kinds that commands name, in the release that they install."""
    known = {
        (item["kind"].lower(), item["metadata"]["name"])
        for objects in manifests.values()
        for item in objects
    }
    known |= {("secret", "phalanx-tls")}  # which Certificate phalanx-server makes
    kinds = ("poddisruptionbudget", "certificate", "secret")
    found = []
    for words in commands:
        pairs = [tuple(word.split("/")) for word in words if word.startswith("deployment/")]
        pairs += [
            (kind, name)
            for kind, name in pairwise(words)
            if kind in kinds and "create" not in words
        ]
        found += pairs
    assert len(found) >= 10
    assert set(found) - known == set()


def test_values_that_commands_set_are_the_charts(runbook: str, template: Any) -> None:
    settings = re.findall(r"--set ([\w.,=]+)", runbook)
    assert len(settings) >= 3
    for setting in settings:
        made = template("--set", setting)
        assert made.returncode == 0, made.stderr


def test_token_file_of_the_runbook_is_read(runbook: str, tmp_path: Path) -> None:
    """The two commands that make it, run as they stand."""
    wanted = ("$ openssl rand", "$ printf 'team-a")
    lines = [line[2:] for line in runbook.splitlines() if line.startswith(wanted)][:2]
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    table = TokenTable.read(str(tmp_path / "tokens"))
    token = (tmp_path / "token").read_text().strip()
    assert table.caller([("authorization", f"Bearer {token}")]).tenant == "team-a"


def test_drain_is_as_long_as_it_says(runbook: str, deploy: Path) -> None:
    from phalanx.controller.app import DRAIN_S

    assert f"may finish for {DRAIN_S:g} s" in runbook
    values = (deploy / "helm/phalanx/values.yaml").read_text(encoding="utf-8")
    assert "graceSeconds: 60" in values and "In all 60 s of grace" in runbook
    assert "endpointSeconds: 5" in values and "5 s until the endpoints" in runbook
