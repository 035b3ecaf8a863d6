"""Norms, activations, rotary positions and the write to the pools, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phalanx.kernels.float8 import FLOAT8, Float8Rows
from phalanx.kernels.gpu import activation, norm, rope
from phalanx.kernels.gpu.conversion import INTERPRETED

pytestmark = [] if INTERPRETED else pytest.mark.gpu

ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error allowed: two roundings of the type, or float32's over a row."""
DTYPES = list(ROUNDING)


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def _rms(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "offset"), [(1, 0.0), (100, 1.0), (2560, 0.0)])
def test_rms_norm(n: int, dtype: torch.dtype, offset: float, device: torch.device) -> None:
    torch.manual_seed(n)
    x, weight = torch.randn(5, n, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
    _close(norm.rms_norm(x, weight, 1e-5, offset), _rms(x, weight, offset), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [100, 2560])
def test_a_sum_is_rounded_before_it_is_normed(
    n: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(n)
    x, residual = torch.randn(2, 5, n, device=device).to(dtype)
    weight = torch.randn(n, device=device).to(dtype)
    total = x + residual
    normed = norm.rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(residual, total)
    _close(normed, _rms(total, weight, 0.0), dtype)


def test_heads_of_a_fused_projection_are_normed_in_place(device: torch.device) -> None:
    torch.manual_seed(0)
    fused, weight = torch.randn(3, 7, 24, device=device), torch.randn(4, 24, device=device)
    heads = fused[:, 2:6]
    _close(norm.rms_norm(heads, weight, 1e-5), _rms(heads, weight, 0.0), torch.float32)
    _close(norm.rms_norm(heads, weight[0], 1e-5), _rms(heads, weight[0], 0.0), torch.float32)
    normed = norm.layer_norm(heads, weight, None, 1e-5)
    wide = heads.double() - heads.double().mean(-1, keepdim=True)
    _close(normed, _rms(wide, weight, 0.0), torch.float32)


@pytest.mark.parametrize("n", [100, 2560])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(n: int, bias: bool, device: torch.device) -> None:
    torch.manual_seed(n)
    x, weight = torch.randn(5, n, device=device) + 30, torch.randn(2, n, device=device)
    got = norm.layer_norm(x, weight[0], weight[1] if bias else None, 1e-5)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    expected = _rms(wide, weight[0], 0.0) + (weight[1].double() if bias else 0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=3e-5)
    plain = norm.layer_norm(x, None, None, 1e-5)
    unit = torch.ones_like(weight[0])
    torch.testing.assert_close(plain.double(), _rms(wide, unit, 0.0), rtol=1e-5, atol=3e-5)


def _dequantised(rows: Float8Rows, expected: Tensor) -> None:
    """float8 e4m3 keeps 4 significant bits, and its smallest step is 2**-9 of the scale."""
    values, scale = rows.levels, rows.scales
    assert values.dtype is FLOAT8 and scale.shape == (len(expected), 1)
    largest = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-2, atol=1e-12)
    got = values.double() * scale.double()
    assert ((got - expected).abs() <= expected.abs() * 2**-4 + scale.double() * 2**-9).all()


def test_a_quantised_norm_has_a_scale_for_each_row(device: torch.device) -> None:
    torch.manual_seed(1)
    x, residual = torch.randn(2, 4, 576, device=device)
    x[1] *= 1000
    x[2], residual[2] = 0, 0
    weight = torch.randn(576, device=device)
    expected = _rms(x + residual, weight, 0.0)
    _dequantised(norm.rms_norm_quantize(x, weight, 1e-5, residual=residual), expected)
    x[3, 7], residual[3, 7] = torch.inf, 0.0
    broken = norm.rms_norm_quantize(x, weight, 1e-5, residual=residual)
    assert broken.scales.isnan()[:, 0].tolist() == [False, False, False, True]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.special.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2,
    "gelu_quick": lambda x: x / (1 + (-1.702 * x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 2 * 1501, device=device) * 4).to(dtype)
    expected = ACTIVATIONS[name](x.double())
    _close(activation.activate(x, name), expected, dtype)
    gated = ACTIVATIONS[name](x[:, :1501].double()) * x[:, 1501:].double()
    _close(activation.activate(x, name, gated=True), gated, dtype)
    _dequantised(activation.gated_quantize(x.float(), name), gated)


def test_an_unknown_activation_is_refused() -> None:
    for run in (activation.activate, activation.gated_quantize):
        with pytest.raises(KeyError, match="swish"):
            run(torch.zeros(1, 2), "swish")


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, cos, sin = heads.double(), cos.double()[:, None], sin.double()[:, None]
    half = cos.shape[-1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "norms", "dtype"),
    [
        (6, 2, 64, 64, "none", torch.bfloat16),
        (9, 3, 80, 32, "none", torch.float32),
        (9, 3, 80, 32, "plain", torch.float16),
        (1, 1, 128, 128, "offset", torch.bfloat16),
        (12, 1, 24, 0, "offset", torch.float32),
        (6, 2, 64, 32, "per head", torch.float32),
        (3, 0, 16, 16, "none", torch.bfloat16),
    ],
)
def test_rope_with_norms_and_the_write_to_the_pools(
    heads: int,
    kv_heads: int,
    dim: int,
    rotary: int,
    norms: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(dim)
    qkv = torch.randn(3, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
    cos, sin = torch.randn(2, 3, rotary // 2, device=device).to(dtype)
    pools = torch.full((2, kv_heads, 5, 4, dim), 7.0, device=device).to(dtype)
    slots = torch.tensor([13, -1, 2], device=device)
    split = qkv.view(3, -1, dim)
    query, key, value = split.double().split([heads, kv_heads, kv_heads], 1)
    given = None
    if norms != "none":
        shapes = ((heads, dim), (kv_heads, dim)) if norms == "per head" else ((dim,), (dim,))
        weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        offset = float(norms == "offset")
        given = (weights[0], weights[1], 1e-5, offset)
        query, key = _rms(query, weights[0], offset), _rms(key, weights[1], offset)
    got = rope.rope_store_kv(qkv, cos, sin, pools[0], pools[1], slots, given)
    # a norm of 3 times a cosine of 3 is 9 before two of them cancel
    scale = 1 if dtype is torch.float32 else 8
    expected = torch.full((2, kv_heads, 20, dim), 7.0, dtype=torch.float64, device=device)
    for token, slot in ((0, 13), (2, 2)):
        expected[0, :, slot] = _rotated(key, cos, sin)[token]
        expected[1, :, slot] = value[token]
    tolerance = ROUNDING[dtype] * scale
    torch.testing.assert_close(
        got.double(), _rotated(query, cos, sin), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        pools.flatten(2, 3).double(), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("fused", [True, False])
def test_pools_in_float8_hold_the_nearest_that_they_can(fused: bool, device: torch.device) -> None:
    """No scale: what is too large becomes 448, what is not a number stays so."""
    torch.manual_seed(2)
    qkv = torch.randn(2, 3 * 32, device=device) * 40
    # the interpreter has no float8 that is not a number
    broken = 0.0 if INTERPRETED else torch.nan
    qkv[0, 64:68] = torch.tensor([1e4, -1e4, broken, 448.0])
    cos, sin = torch.ones(2, 16, device=device), torch.zeros(2, 16, device=device)
    pools = torch.zeros(2, 1, 3, 4, 32, device=device).to(FLOAT8)
    slots = torch.tensor([9, 2], device=device)
    _, key, value = qkv.view(2, 3, 32).split(1, 1)
    if fused:
        rope.rope_store_kv(qkv, cos, sin, pools[0], pools[1], slots)
    else:
        rope.store_kv(key, value, pools[0], pools[1], slots)
    for pool, heads in zip(pools.flatten(2, 3)[:, 0].float(), (key, value), strict=True):
        expected = heads[:, 0].clamp(-448, 448)
        torch.testing.assert_close(pool[[9, 2]], expected, rtol=2**-4, atol=2**-9, equal_nan=True)
        assert not pool[[0, 1, *range(3, 9), 10, 11]].any()


def test_rope_and_store_take_views(device: torch.device) -> None:
    torch.manual_seed(0)
    fused = torch.randn(3, 11, 24, device=device)
    cos, sin = torch.randn(2, 3, 8, device=device)
    got = rope.rope(fused[:, 1:4], cos, sin)
    _close(got, _rotated(fused[:, 1:4], cos, sin), torch.float32)
    pools, slots = torch.zeros(2, 9, 3, 2, 24, device=device), torch.tensor([5, -1, 0])
    rope.store_kv(fused[:, :9], fused[:, 2:], pools[0], pools[1], slots.to(device))
    expected = torch.zeros(2, 9, 6, 24, device=device)
    for token, slot in ((0, 5), (2, 0)):
        expected[0, :, slot], expected[1, :, slot] = fused[token, :9], fused[token, 2:]
    assert torch.equal(pools.flatten(2, 3), expected)
