"""Weights of 8 and 4 bits: what is packed, and products with it, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phalanx.kernels import int4 as rule
from phalanx.kernels.float8 import FLOAT8, Float8Rows, pack, quantize
from phalanx.kernels.gpu.activation import quantize_rows
from phalanx.kernels.gpu.conversion import INTERPRETED
from phalanx.kernels.gpu.float8 import GpuFloat8Linear
from phalanx.kernels.gpu.int4 import GpuInt4Linear

pytestmark = [] if INTERPRETED else pytest.mark.gpu

ROUNDING = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def _close(got: Tensor, expected: Tensor) -> None:
    tolerance = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_float8_weights_keep_four_bits(device: torch.device) -> None:
    weight = torch.randn(16, 48, device=device)
    weight[3] *= 1e4
    weight[4] = 0
    values, scale = pack(weight)
    error = (values.double() * scale.double() - weight.double()).abs()
    assert (error <= weight.double().abs() * 2**-4 + scale.double() * 2**-10).all()


def test_quantised_rows(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 600, device=device).bfloat16() * 3
    x[2] = 0
    rows = quantize_rows(x)
    assert rows.levels.dtype is FLOAT8 and rows.dtype is x.dtype
    error = (rows.levels.double() * rows.scales.double() - x.double()).abs()
    assert (error <= x.double().abs() * 2**-4 + rows.scales.double() * 2**-9).all()
    torch.testing.assert_close(rows.scales, quantize(x)[1])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(broken: float, device: torch.device) -> None:
    """A row's failure is seen in its logits, and in no other row's."""
    x = torch.randn(3, 64, device=device).bfloat16()
    x[1, 5] = broken
    layer = GpuFloat8Linear(torch.randn(32, 64, device=device).bfloat16(), None)
    assert layer(x).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("rows", [1, 4, 16, 17])
@pytest.mark.parametrize("shape", [(32, 64), (37, 90)])
def test_float8_layers(
    rows: int, shape: tuple[int, int], device: torch.device, library: None
) -> None:
    """The same arithmetic at any number of rows, and for sizes that no kernel likes."""
    torch.manual_seed(rows)
    (outputs, inputs) = shape
    weight, bias = torch.randn(shape, device=device) / 8, torch.randn(outputs, device=device)
    x = torch.randn(rows, inputs, device=device).bfloat16()
    layer = GpuFloat8Linear(weight.bfloat16(), bias.bfloat16())
    values, scale = (part.double() for part in pack(weight.bfloat16()))
    given = quantize_rows(x)
    rounded = given.levels.double() * given.scales.double()
    expected = rounded @ (values * scale).T + bias.bfloat16().double()
    assert layer(x).shape == (rows, outputs) and layer(x).is_contiguous()
    _close(layer(x), expected)
    assert torch.equal(layer.of_rows(given), layer(x))


def test_float8_layers_without_rows_outputs_or_inputs(device: torch.device, library: None) -> None:
    weight = torch.randn(20, 40, device=device).bfloat16()
    bias = torch.randn(20, device=device).bfloat16()
    x = torch.randn(3, 40, device=device).bfloat16()
    assert GpuFloat8Linear(weight, bias)(x[:0]).shape == (0, 20)
    assert GpuFloat8Linear(weight[:0], None)(x).shape == (3, 0)
    assert torch.equal(GpuFloat8Linear(weight[:, :0], bias)(x[:, :0]), bias.expand(3, 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40, 65])
@pytest.mark.parametrize("inputs", [5 * 128, 4 * 128 + 72])
def test_int4_layers(rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(rows)
    weight = (torch.randn(70, inputs, device=device) / inputs**0.5).to(dtype)
    bias = torch.randn(70, device=device).to(dtype)
    rounded = rule.dequantize(*rule.quantize(weight), inputs)
    layer = GpuInt4Linear(weight, bias)
    assert torch.equal(layer.unpacked(dtype), rounded)
    # what lies behind the row must not be read as inputs
    x = torch.full((rows, inputs + 56), torch.nan, device=device, dtype=dtype)[:, :inputs]
    x.copy_(torch.randn(rows, inputs, device=device))
    _close(layer(x), x.double() @ rounded.double().T + bias.double())


def test_int4_weights_use_all_their_steps(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 200, device=device)
    weight[4] = 0
    steps, scales = rule.quantize(weight)
    assert steps.shape == (9, 256) and scales.shape == (9, 2)
    assert steps.min() == -8 and steps.max() == 7 and not steps[4].any()
    error = (rule.dequantize(steps, scales, 200) - weight).abs()
    peaks = weight[:, :128].abs().amax(1)
    assert (error[:, :128] <= peaks[:, None] * (1 / 8 + 0.2)).all()
    assert error.square().mean().sqrt() < 0.1 * weight.std()
    assert (
        GpuInt4Linear(weight, None)
        .unpacked(torch.float32)
        .equal(rule.dequantize(steps, scales, 200))
    )
    weight[2, 3] = torch.nan
    assert rule.dequantize(*rule.quantize(weight), 200)[2].isnan().any()


def test_int4_layers_without_inputs(device: torch.device) -> None:
    weight, bias = torch.randn(9, 0, device=device).half(), torch.randn(9, device=device).half()
    got = GpuInt4Linear(weight, bias)(torch.randn(3, 0, device=device).half())
    assert torch.equal(got, bias.expand(3, 9))


def test_rounded_rows_are_counted(device: torch.device) -> None:
    rows = quantize_rows(torch.randn(7, 16, device=device).half())
    assert isinstance(rows, Float8Rows) and len(rows) == 7
