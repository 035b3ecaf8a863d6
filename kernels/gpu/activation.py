"""Activations: plain, times a gate, or times a gate and quantised to float8.

Shapes: [T, n] or [T, 2 n] = [gate | up] -> [T, n]. Bytes moved: one read and one write of every
element. Elementwise work has no reuse, so a program takes `BLOCK` consecutive elements of one
row, 8 a thread: one 16-byte load of each operand. Quantising needs a row's largest element, so
there a program walks its row twice; the second reading comes from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phalanx.kernels.float8 import FLOAT8, Float8Rows

from .conversion import float8_levels, float8_scale, float8_size, rounded
from .launch import launch

BLOCK, WARPS = 1024, 4
QUANTIZED_BLOCK, QUANTIZED_WARPS = 4096, 8
NAMES = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2")


@triton.jit
def _activated(x, NAME: tl.constexpr):
    """float32 x by the activation's name."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) = sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "gelu_quick":
        return x * tl.sigmoid(1.702 * x)
    elif NAME == "relu":
        return tl.maximum(x, 0.0)
    else:
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)


@triton.jit
def _gated(x_ptr, row, column, inside, stride, N: tl.constexpr, NAME: tl.constexpr):
    """activate(gate) * up in float32, the activated gate rounded as torch rounds it.

    Without a name, x itself.
    """
    if NAME == "":
        return tl.load(x_ptr + row * stride + column, inside, 0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * stride + column, inside, 0.0)
    up = tl.load(x_ptr + row * stride + N + column, inside, 0.0)
    activated = rounded(_activated(gate.to(tl.float32), NAME), x_ptr.dtype.element_ty)
    return activated.to(tl.float32) * up.to(tl.float32)


@triton.jit
def _activate(
    x_ptr,
    out_ptr,
    stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One program: BLOCK elements of a row."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    if GATED:
        result = _gated(x_ptr, row, column, inside, stride, N, NAME)
    else:
        x = tl.load(x_ptr + row * stride + column, inside, 0.0)
        result = _activated(x.to(tl.float32), NAME)
    tl.store(out_ptr + row * N + column, rounded(result, out_ptr.dtype.element_ty), inside)


@triton.jit
def _quantize(
    x_ptr,
    out_ptr,
    scale_ptr,
    stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    NAME: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One program: a row; first its largest element, then the elements in units of the scale."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        column = start + offsets
        value = _gated(x_ptr, row, column, column < N, stride, N, NAME)
        value = rounded(value, x_ptr.dtype.element_ty).to(tl.float32)
        largest = tl.maximum(largest, float8_size(value))
    scale = float8_scale(tl.max(largest, 0))
    tl.store(scale_ptr + row, scale)
    for start in range(0, N, BLOCK):
        column = start + offsets
        value = _gated(x_ptr, row, column, column < N, stride, N, NAME)
        value = rounded(value, x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + row * N + column, float8_levels(value, scale), column < N)


def _matrix(x: Tensor) -> Tensor:
    matrix = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def activate(x: Tensor, activation: str, *, gated: bool = False, ahead: bool = False) -> Tensor:
    """activate(x), or activate(gate) * up of x [..., 2 n]; an unknown name is a KeyError.

    ahead: as for `rms_norm`.
    """
    if activation not in NAMES:
        raise KeyError(activation)
    n = x.shape[-1] // 2 if gated else x.shape[-1]
    matrix = _matrix(x)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if out.numel():
        launch(_activate, len(matrix), -(-n // BLOCK))(
            matrix,
            out,
            matrix.stride(0),
            N=n,
            BLOCK=BLOCK,
            NAME=activation,
            GATED=gated,
            AHEAD=ahead,
            num_warps=WARPS,
        )
    return out


def gated_quantize(gate_up: Tensor, activation: str, *, ahead: bool = False) -> Float8Rows:
    """activate(gate) * up of [T, 2 n], rounded to float8."""
    if activation not in NAMES:
        raise KeyError(activation)
    return _quantized(gate_up, gate_up.shape[-1] // 2, activation, ahead)


def quantize_rows(x: Tensor, *, ahead: bool = False) -> Float8Rows:
    """x [T, n], rounded to float8."""
    return _quantized(x, x.shape[-1], "", ahead)


def _quantized(x: Tensor, n: int, name: str, ahead: bool) -> Float8Rows:
    matrix = _matrix(x)
    out = torch.empty(len(matrix), n, dtype=FLOAT8, device=x.device)
    scale = torch.empty(len(matrix), 1, dtype=torch.float32, device=x.device)
    if len(matrix):
        launch(_quantize, len(matrix))(
            matrix,
            out,
            scale,
            matrix.stride(0),
            N=n,
            BLOCK=QUANTIZED_BLOCK,
            NAME=name,
            AHEAD=ahead,
            num_warps=QUANTIZED_WARPS,
        )
    return Float8Rows(out, scale, x.dtype)
