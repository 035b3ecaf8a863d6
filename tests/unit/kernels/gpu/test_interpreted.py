"""Runs the tests of `numerics/` in Triton's interpreter.

In a process of their own: the interpreter is chosen when Triton is imported, and the compiled
tests beside this file need it off. On a machine with CUDA, `pytest -m gpu` runs the same tests
on the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("module", sorted(path.name for path in HERE.glob("numerics/test_*.py")))
def test_kernels_are_right_in_the_interpreter(module: str) -> None:
    pytest.importorskip("triton")
    command = [str(Path(sys.executable).with_name("pytest")), "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "numerics" / module)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
