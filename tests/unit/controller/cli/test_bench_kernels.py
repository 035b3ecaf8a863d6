"""`phalanx bench kernels`: a process with torch measures, this one shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.commands import kernels

Run = Callable[..., Any]
LINES = [
    {"device": "cpu", "kernels": "reference", "shape": "smollm2-135m", "dtype": "bfloat16"},
    {"copy": 2e10, "read": 3e10, "matrix": 1e12},
    {
        "kernel": "rope",
        "size": "7 tokens",
        "seconds": 2e-6,
        "bytes": 30000,
        "flops": 0,
        "share": 0.5,
        "bound": "memory",
    },
]


def test_a_table_and_a_report(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def measured(words: list[str]) -> Iterator[dict[str, Any]]:
        asked.append(words)
        yield from LINES

    monkeypatch.setattr(kernels, "measured", measured)
    report = tmp_path / "kernels.json"
    result = run("bench", "kernels", "--device", "cpu", "--tokens", "7", "--output", str(report))
    assert result.exit_code == 0
    assert asked == [["--context", "1024", "--device", "cpu", "--tokens", "7"]]
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("rope"))
    assert row == ["rope", "7", "tokens", "2.0", "us", "15", "memory", "50", "%"]
    assert "read 30 GB/s" in result.stdout
    assert json.loads(report.read_text())["kernels"] == LINES[2:]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("phalanx.no_such_module", "ended with code 1"),
        ("phalanx.kernels.bench", "argument --tokens: invalid int value: 'many'"),
    ],
)
def test_what_the_process_says_is_told(
    monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    monkeypatch.setattr(kernels, "MODULE", program)
    with pytest.raises(Exception, match=words):
        list(kernels.measured(["--tokens", "many"]))
