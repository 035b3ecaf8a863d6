"""Steps of many rows, which threads take through the layers in groups, and of which few are wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.kernels.cpu.library import library_path
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.fused import HeadWidth, Reduction
from phalanx.kernels.interface import SequenceSpan

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)

SPANS = [
    SequenceSpan(0, 1, 41, [11, 10]),
    SequenceSpan(1, 220, 250, [0, 1, 2, 3, 4, 7, 8, 9]),
    SequenceSpan(221, 30, 30, [6]),
]
TOKENS = 251
FIELDS: list[dict[str, Any]] = [
    {"dim": 32},  # pools in panels, where they are of bfloat16
    {"block": "parallel", "norm": "layer", "gated": False, "hidden": 55, "dim": 11},
    {"block": "parallel_two", "head_norm": "width", "hidden": 55},
    {"block": "sandwich", "head_norm": "each", "clip": 0.7, "residual_scale": 0.4},
    {"block": "post", "alibi": True},
]


def run(
    stacks: Any, fields: dict[str, Any], dtype: torch.dtype, int8: bool, threads: int, rows: Tensor
) -> Tensor:
    kind = stacks.kind(**fields, block_size=32)
    program = stacks.program(
        stacks.part(dtype, kind),
        Reduction(),
        NativeBackend(threads),
        int8=int8,
        width=HeadWidth(4 * kind.dim, 2 * kind.dim, True),
        spans=SPANS,
        rows=rows,
    )
    result: Tensor = program(*stacks.inputs(dtype, kind, TOKENS))
    return result


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize(
    ("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_bits_depend_neither_on_the_groups_nor_on_which_rows_are_wanted(
    stacks: Any, fields: dict[str, Any], dtype: torch.dtype, int8: bool
) -> None:
    """One or two threads have rows enough to take them in groups, four share each operation."""
    every = run(stacks, fields, dtype, int8, 4, torch.arange(TOKENS))
    assert torch.isfinite(every.float()).all()
    for threads in (1, 2):
        assert torch.equal(every, run(stacks, fields, dtype, int8, threads, torch.arange(TOKENS)))
    for threads in (1, 2, 4):
        # some of one sequence, in two runs, none of another, in an order of their own
        rows = torch.tensor([150, 0, 151, 149, 17])
        assert torch.equal(every[rows], run(stacks, fields, dtype, int8, threads, rows))
    nothing = run(stacks, fields, dtype, int8, 2, torch.arange(0))
    assert nothing.shape == (0, every.shape[1])
