"""What is recorded takes nothing to the host, and names no other device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from phalanx.protos.recording import MAX_RECORDED_ROWS
from phalanx.workers.graphs.steps import batch_sizes


def test_nothing_is_read_and_no_device_is_mixed(tiny_llama: Callable[..., Path]) -> None:
    """On a device that holds no values at all; planted faults are found."""
    program = Path(__file__).with_name("fake_device.py")
    words = [sys.executable, str(program), str(tiny_llama())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    outcomes = json.loads(done.stdout)
    assert outcomes.pop("one rank") == outcomes.pop("two ranks") == [1, 2, 4, 8, 9]
    assert {name: text.partition(":")[0] for name, text in outcomes.items()} == {
        "a value is read": "DataDependentOutputException",
        "a shape is read": "DynamicOutputShapeException",
        "a CPU's tensor": "FakeTensorDeviceMismatchError",
    }


@given(st.integers(1, 4 * MAX_RECORDED_ROWS))
def test_no_step_is_padded_by_much(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == min(most, MAX_RECORDED_ROWS)
    for rows in range(1, sizes[-1] + 1):
        assert min(size for size in sizes if size >= rows) <= rows + 7 + rows // 8
