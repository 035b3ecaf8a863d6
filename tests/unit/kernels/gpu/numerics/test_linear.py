"""Products of few rows with weights of 16, 8 and 4 bits, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phalanx.kernels.gpu import linear
from phalanx.kernels.gpu.conversion import INTERPRETED
from phalanx.kernels.gpu.linear import GpuLinear, small_product

pytestmark = [] if INTERPRETED else pytest.mark.gpu

ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def _close(got: Tensor, expected: Tensor) -> None:
    tolerance = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 1100), (3, 8)])
def test_few_rows(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool, device: torch.device
) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 2 * inputs, device=device).to(dtype)[:, :inputs]
    weight = (torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype)
    added = torch.randn(outputs, device=device).to(dtype) if bias else None
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    _close(small_product(x, weight, added), expected)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_float8_weights_with_a_scale_for_each_output(rows: int, device: torch.device) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 520, device=device).bfloat16()
    weight = torch.randn(33, 520, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(33, 1, device=device) / 20
    _close(small_product(x, weight, None, scale), x.double() @ (weight.double() * scale).T)


def test_a_row_does_not_depend_on_the_rows_beside_it(device: torch.device) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 600, device=device).half(), torch.randn(9, 600, device=device).half()
    together = small_product(x, weight)
    for row in range(4):
        assert torch.equal(small_product(x[row : row + 1], weight), together[row : row + 1])


def test_how_inputs_are_split_depends_on_the_matrix_alone() -> None:
    for outputs, inputs in ((4096, 4096), (4096, 14336), (1024, 4096), (70, 100), (128256, 4096)):
        split = linear.split_inputs(outputs, inputs)
        parts = -(-inputs // split)
        assert split % linear.SOME_TILE.inputs == 0
        assert (parts - 1) * split < inputs <= parts * split
    assert linear.split_inputs(128256, 4096) == 4096
    assert -(-4096 // linear.split_inputs(1024, 4096)) == 8


def test_a_packed_weight_takes_any_number_of_rows(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(10, 32, device=device).bfloat16() / 6
    packed = GpuLinear(weight, None)
    for rows in (0, 1, 16, 17, 40):
        x = torch.randn(rows, 32, device=device).bfloat16()
        _close(packed(x), x.double() @ weight.double().T)
    assert GpuLinear(weight[:, :0], None)(x[:, :0]).shape == (40, 10)
    assert GpuLinear(weight[:0], None)(x[:3]).shape == (3, 0)
