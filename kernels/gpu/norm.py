"""RMS norm and layer norm, alone or after a residual sum, rounded or quantised to float8.

Shapes: T rows of n elements; with heads, [T, H, D] whose rows are the T * H heads.
Bytes moved: one read of every input and one write of every output. A row stays in registers from
its sum to its norm, so that nothing is read twice: that is why one program holds whole rows, as
many of them as make `TILE` elements where they are short.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phalanx.kernels.float8 import FLOAT8, Float8Rows

from .conversion import float8_levels, float8_scale, float8_size, rounded
from .launch import launch, next_power_of_2, row_strides

TILE = 2048  # elements of a program whose rows are short: 16 bytes a thread at 4 warps, twice


@triton.jit
def _places(
    rows, heads, token_stride, head_stride, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """A program's rows [ROWS, 1] and columns [1, BLOCK], which of them exist, and where x has them."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < N)
    return row, column, inside, row // heads * token_stride + row % heads * head_stride + column


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    rows,
    heads,
    token_stride,
    head_stride,
    weight_rows,
    eps,
    offset,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    QUANTIZE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One program: ROWS rows. x and residual are overwritten by their sum if ADD."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    row, column, inside, at = _places(rows, heads, token_stride, head_stride, N, BLOCK, ROWS)
    x = tl.load(x_ptr + at, inside, 0.0)
    dtype = x.dtype
    if ADD:
        total = x.to(tl.float32) + tl.load(residual_ptr + row * N + column, inside, 0.0)
        x = rounded(total, dtype)
        tl.store(residual_ptr + row * N + column, x, inside)
    wide = x.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / N + eps)
    weight = tl.load(weight_ptr + row % weight_rows * N + column, inside, 0.0).to(tl.float32)
    if OFFSET:
        normed = wide * (offset + weight)
    else:
        normed = rounded(wide, dtype).to(tl.float32) * weight
    if QUANTIZE:
        normed = rounded(normed, dtype).to(tl.float32)
        scale = float8_scale(tl.max(float8_size(normed), 1, keep_dims=True))
        tl.store(scale_ptr + row, scale, row < rows)
        tl.store(out_ptr + row * N + column, float8_levels(normed, scale), inside)
    else:
        tl.store(out_ptr + row * N + column, rounded(normed, out_ptr.dtype.element_ty), inside)


@triton.jit
def _layer_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    heads,
    token_stride,
    head_stride,
    weight_rows,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program: ROWS rows; the variance from the centred values, not from a difference."""
    row, column, inside, at = _places(rows, heads, token_stride, head_stride, N, BLOCK, ROWS)
    wide = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    wide = tl.where(inside, wide - tl.sum(wide, 1, keep_dims=True) / N, 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, 1, keep_dims=True) / N + eps)
    if WEIGHT:
        wide *= tl.load(weight_ptr + row % weight_rows * N + column, inside, 0.0).to(tl.float32)
    if BIAS:
        wide += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * N + column, rounded(wide, out_ptr.dtype.element_ty), inside)


class Shape(NamedTuple):
    """How rows of n elements are divided among programs."""

    block: int
    rows: int
    warps: int


def shape(n: int) -> Shape:
    """16 elements a thread for long rows: two 16-byte loads of bfloat16, and few registers."""
    block = next_power_of_2(n)
    if block <= TILE:
        return Shape(block, max(TILE // block, 1), 4)
    return Shape(block, 1, min(max(block // 512, 4), 16))


def _rows(x: Tensor, weight: Tensor | None) -> tuple[Tensor, int, list[int]]:
    """(x, rows, [heads, token stride, head stride, rows of the weight])."""
    x, heads, token_stride, head_stride = row_strides(x)
    repeated = 1 if weight is None or weight.dim() == 1 else weight.shape[-2]
    return x, x.numel() // max(x.shape[-1], 1), [heads, token_stride, head_stride, repeated]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    residual: Tensor | None = None,
    ahead: bool = False,
) -> Tensor:
    """Norm of x, or of x + residual; that sum is then written into residual.

    ahead: the next kernel may begin with what does not depend on this one, if it was told so.
    """
    out = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device)
    _launch_rms_norm(x, weight, eps, offset, residual, out, None, ahead)
    return out


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    residual: Tensor | None = None,
    ahead: bool = False,
) -> Float8Rows:
    """`rms_norm` of a matrix, rounded to float8."""
    out = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _launch_rms_norm(x, weight, eps, offset, residual, out, scale, ahead)
    return Float8Rows(out, scale, x.dtype)


def _launch_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    residual: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    ahead: bool,
) -> None:
    x, rows, strides = _rows(x, weight)
    n = x.shape[-1]
    if not rows or not n:
        return
    block, count, warps = shape(n)
    launch(_rms_norm, -(-rows // count))(
        x,
        residual,
        weight.contiguous(),
        out,
        scale,
        rows,
        *strides,
        eps,
        offset,
        N=n,
        BLOCK=block,
        ROWS=count,
        ADD=residual is not None,
        OFFSET=bool(offset),
        QUANTIZE=scale is not None,
        AHEAD=ahead,
        num_warps=warps,
    )


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / std * weight + bias; a weight [H, D] belongs to heads."""
    x, rows, strides = _rows(x, weight)
    n = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows and n:
        block, count, warps = shape(n)
        launch(_layer_norm, -(-rows // count))(
            x,
            None if weight is None else weight.contiguous(),
            bias,
            out,
            rows,
            *strides,
            eps,
            N=n,
            BLOCK=block,
            ROWS=count,
            WEIGHT=weight is not None,
            BIAS=bias is not None,
            num_warps=warps,
        )
    return out
