"""The parts of `driver.py`, as tests: `pytest -m gpu tests/gpu` on a machine with a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", ["kernels", "engine", "two-ranks"])
def test_it_gives_what_the_reference_gives(driver: Any, part: str, tmp_path: Path) -> None:
    words = driver.arguments([part, "--out", str(tmp_path)])
    outcome = driver.part(part)(words)
    assert [row for row in outcome["rows"] if not row["ok"]] == []
    assert outcome["rows"]


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_steps_come_near_their_floor(driver: Any, tmp_path: Path) -> None:
    words = driver.arguments(["speed", "--out", str(tmp_path)])
    outcome = driver.part("speed")(words)
    assert [row for row in outcome["rows"] if not row["reached"]] == []
