"""Weights of 8 and 4 bits: what is packed, and products with it, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phalanx.kernels.gpu import float8
from phalanx.kernels.gpu.activation import quantize_rows
from phalanx.kernels.gpu.conversion import FLOAT8, INTERPRETED
from phalanx.kernels.gpu.float8 import Float8Linear, pack_float8
from phalanx.kernels.gpu.int4 import Int4Linear, pack_int4, pack_nibbles

pytestmark = [] if INTERPRETED else pytest.mark.gpu

ROUNDING = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def _close(got: Tensor, expected: Tensor) -> None:
    tolerance = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_float8_weights_keep_four_bits(device: torch.device) -> None:
    weight = torch.randn(16, 48, device=device)
    weight[3] *= 1e4
    weight[4] = 0
    values, scale = pack_float8(weight)
    error = (values.double() * scale.double() - weight.double()).abs()
    assert (error <= weight.double().abs() * 2**-4 + scale.double() * 2**-10).all()


def test_quantised_rows(device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 600, device=device).bfloat16() * 3
    x[2] = 0
    values, scale = quantize_rows(x)
    assert values.dtype is FLOAT8
    error = (values.double() * scale.double() - x.double()).abs()
    assert (error <= x.double().abs() * 2**-4 + scale.double() * 2**-9).all()


def _scaled(a: Tensor, b: Tensor, **given: Tensor) -> Tensor:
    """What the library's scaled product is documented to compute, with its checks of layouts."""
    assert a.dtype is b.dtype is FLOAT8
    assert a.is_contiguous() and b.t().is_contiguous() and b.shape[0] % 16 == b.shape[1] % 16 == 0
    scale_a, scale_b = given["scale_a"], given["scale_b"]
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
    assert scale_a.dtype is scale_b.dtype is torch.float32
    assert scale_a.is_contiguous() and scale_b.is_contiguous()
    total = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
    return (total + given["bias"].double()).to(given["out_dtype"])  # type: ignore[call-overload]


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_float8_layers(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rows)
    if INTERPRETED:
        monkeypatch.setattr(float8.torch, "_scaled_mm", _scaled)
    weight, bias = torch.randn(32, 64, device=device) / 8, torch.randn(32, device=device)
    x = torch.randn(rows, 64, device=device).bfloat16()
    values, scale = pack_float8(weight)
    layer = Float8Linear(values, scale, bias.bfloat16())
    expected = x.double() @ (values.double() * scale.double()).T + bias.bfloat16().double()
    if rows <= 16:
        _close(layer(x), expected)
    else:  # inputs as well keep four bits, whose errors add up like a random walk
        assert ((layer(x).double() - expected).abs() < 0.15).all()
        assert ((layer(x).double() - expected).abs().mean() < 0.03).all()


def test_sizes_that_float8_products_do_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[20, 64\]"):
        Float8Linear(torch.zeros(20, 64, dtype=FLOAT8), torch.ones(20, 1), None)


@pytest.mark.parametrize(("dtype", "zeros"), [(torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("rows", [1, 40, 65])
def test_int4_layers(rows: int, dtype: torch.dtype, zeros: bool, device: torch.device) -> None:
    torch.manual_seed(rows)
    outputs, groups = 70, 5
    steps = torch.randint(16, (outputs, groups * 128), device=device)
    scales = (torch.rand(outputs, groups, device=device) / 64).to(dtype)
    zero = torch.randint(16, (outputs, groups), device=device) if zeros else None
    bias = torch.randn(outputs, device=device).to(dtype)
    offset = torch.tensor(8) if zero is None else zero.repeat_interleave(128, 1)
    weight = (steps - offset) * scales.double().repeat_interleave(128, 1)
    weight = weight.to(dtype)  # one more rounding: the product of a nibble and a scale
    layer = Int4Linear(
        pack_nibbles(steps), scales, bias, None if zero is None else zero.to(torch.int8)
    )
    x = torch.randn(rows, groups * 128, device=device).to(dtype)
    assert torch.equal(layer.unpacked(dtype), weight)
    _close(layer(x), x.double() @ weight.double().T + bias.double())


def test_int4_weights_are_rounded_to_the_nearest_step(device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(9, 256, device=device)
    words, scales = pack_int4(weight)
    got = Int4Linear(words, scales, None).unpacked(torch.float32)
    error = (got - weight).abs().view(9, 2, 128)
    assert (error <= scales[..., None] * 0.5001).all()
    with pytest.raises(ValueError, match="200 inputs"):
        pack_int4(weight[:, :200])
