"""Products of few rows with a weight matrix, which are reads of the weights.

Shapes: x [M, K], weight [N, K] of bfloat16, float16 or float8 with a scale for each output ->
[M, N]. Bytes moved: the weights once; x comes from the L2 cache.

Up to 4 rows: a program owns some outputs and all of K. Sums are kept for each lane of the tile and
folded once at the end; no tensor cores, no shared memory, 16-byte loads straight to registers,
the next tile of weights in flight while this one is multiplied. Weights do not depend on the kernel
before, so with `programmatic` launches the first tile is loaded before waiting for it.

5 to 16 rows: tensor cores, the weights as the long side. Outputs alone are too few programs to keep
the memory busy, so K is split; a second kernel adds the parts in order. How K is split depends on
the matrix alone: a row's bits do not depend on how many rows there are within a kernel's range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .conversion import product, rounded
from .launch import launch, next_power_of_2

FEW, SOME = 4, 16
"""Rows up to which the two kernels are used; above, the library's product."""
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


class Tile(NamedTuple):
    """Outputs and inputs of a tile, warps of a program."""

    outputs: int
    inputs: int
    warps: int


FEW_TILES = {
    # 16 or 32 weights a thread: two to four 16-byte loads, times the rows' sums in registers
    (1, 1): Tile(4, 1024, 4),
    (1, 2): Tile(8, 512, 4),
    (2, 1): Tile(4, 1024, 4),
    (2, 2): Tile(4, 512, 4),
    (4, 1): Tile(4, 512, 4),
    (4, 2): Tile(4, 512, 4),
}
"""By (rows, bytes of a weight)."""
SOME_TILE, SOME_STAGES = Tile(64, 128, 4), 4  # 16 KB of weights a stage
MERGE_BLOCK = 256


@triton.jit
def _few_rows(
    x_ptr, weight_ptr, scale_ptr, row_scale_ptr, bias_ptr, out_ptr, rows, outputs, x_stride,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALE: tl.constexpr, ROW_SCALE: tl.constexpr, BIAS: tl.constexpr, PROGRAMMATIC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all rows."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    row = tl.arange(0, ROWS)
    at = output.to(tl.int64)[:, None] * K + column[None, :]
    inside = (output < outputs)[:, None]
    weight = tl.load(weight_ptr + at, inside & (column < K)[None, :], 0.0)
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        following = first + BLOCK_K + column
        ahead = tl.load(weight_ptr + at + first + BLOCK_K, inside & (following < K)[None, :], 0.0)
        here = (row < rows)[:, None] & (first + column < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + first + column[None, :], here, 0.0)
        sums += x.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
        weight = ahead
    total = tl.sum(sums, 2)
    if SCALE:
        total *= tl.load(scale_ptr + output, output < outputs, 0.0)[None, :]
    if ROW_SCALE:
        total *= tl.load(row_scale_ptr + row, row < rows, 0.0)[:, None]
    if BIAS:
        total += tl.load(bias_ptr + output, output < outputs, 0.0).to(tl.float32)[None, :]
    to = out_ptr + row[:, None] * outputs + output[None, :]
    filled = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(to, rounded(total, out_ptr.dtype.element_ty), filled)


@triton.jit
def _some_rows(
    x_ptr, weight_ptr, parts_ptr, rows, outputs, x_stride, split,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs of all rows over inputs [part * split, (part + 1) * split)."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = tl.arange(0, ROWS)
    at = output.to(tl.int64)[:, None] * K
    # float8 is multiplied as bfloat16, which holds it: few rows do not need the faster product
    narrow: tl.constexpr = x_ptr.dtype.element_ty == tl.float8e4nv
    dtype: tl.constexpr = tl.bfloat16 if narrow else x_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in tl.range(part * split, min((part + 1) * split, K), BLOCK_K, num_stages=STAGES):
        column = first + tl.arange(0, BLOCK_K)
        inside = (output < outputs)[:, None] & (column < K)[None, :]
        weight = tl.load(weight_ptr + at + column[None, :], inside, 0.0)
        here = (row < rows)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], here, 0.0)
        total = product(weight.to(dtype), tl.trans(x.to(dtype)), total)
    to = parts_ptr + (part * rows + row[None, :]) * outputs + output[:, None]
    tl.store(to, total, (row < rows)[None, :] & (output < outputs)[:, None])


@triton.jit
def _merge_parts(
    parts_ptr, scale_ptr, row_scale_ptr, bias_ptr, out_ptr, rows, outputs, parts,
    BLOCK: tl.constexpr, SCALE: tl.constexpr, ROW_SCALE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK outputs of a row, the parts added in order."""
    row = tl.program_id(0)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = output < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + (part * rows + row) * outputs + output, inside, 0.0)
    if SCALE:
        total *= tl.load(scale_ptr + output, inside, 0.0)
    if ROW_SCALE:
        total *= tl.load(row_scale_ptr + row)
    if BIAS:
        total += tl.load(bias_ptr + output, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * outputs + output, rounded(total, out_ptr.dtype.element_ty), inside)


def split_inputs(outputs: int, inputs: int) -> int:
    """Inputs of a part for 5 to 16 rows: as few parts as give `PROGRAMS`, of 4 tiles at least."""
    tiles = -(-inputs // SOME_TILE.inputs)
    parts = min(-(-PROGRAMS // -(-outputs // SOME_TILE.outputs)), max(tiles // 4, 1))
    return -(-tiles // parts) * SOME_TILE.inputs


def small_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    programmatic: bool = False,
) -> Tensor:
    """(x [M, K] * row_scale [M, 1]) @ (weight [N, K] * scale [N, 1]).T + bias for M <= `SOME`, in
    `dtype`, by default x's."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    (rows, inputs), outputs = x.shape, len(weight)
    out = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    if not rows or not outputs:
        return out
    if rows <= FEW:
        padded = next_power_of_2(rows)
        tile = FEW_TILES[padded, weight.element_size()]
        options = {"launch_pdl": True} if programmatic else {}
        launch(_few_rows, -(-outputs // tile.outputs))(
            x,
            weight,
            scale,
            row_scale,
            bias,
            out,
            rows,
            outputs,
            x.stride(0),
            K=inputs,
            ROWS=padded,
            BLOCK_N=tile.outputs,
            BLOCK_K=tile.inputs,
            SCALE=scale is not None,
            ROW_SCALE=row_scale is not None,
            BIAS=bias is not None,
            PROGRAMMATIC=programmatic,
            num_warps=tile.warps,
            **options,
        )
        return out
    parts = _some(x, weight)
    merge_parts(parts, out, bias, scale, row_scale)
    return out


def _some(x: Tensor, weight: Tensor) -> Tensor:
    """Sums over parts of the inputs, float32 [parts, M, N], for 5 to 16 rows."""
    (rows, inputs), outputs = x.shape, len(weight)
    split = split_inputs(outputs, inputs)
    count = max(-(-inputs // split), 1)
    parts = torch.empty(count, rows, outputs, dtype=torch.float32, device=x.device)
    launch(_some_rows, -(-outputs // SOME_TILE.outputs), count)(
        x,
        weight,
        parts,
        rows,
        outputs,
        x.stride(0),
        split,
        K=inputs,
        ROWS=SOME,
        BLOCK_N=SOME_TILE.outputs,
        BLOCK_K=SOME_TILE.inputs,
        STAGES=SOME_STAGES,
        num_warps=SOME_TILE.warps,
    )
    return parts


def merge_parts(
    parts: Tensor,
    out: Tensor,
    bias: Tensor | None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """Write the sum of parts float32 [parts, M, N], in order, scaled and biased, to out [M, N]."""
    count, rows, outputs = parts.shape
    launch(_merge_parts, rows, -(-outputs // MERGE_BLOCK))(
        parts,
        scale,
        row_scale,
        bias,
        out,
        rows,
        outputs,
        count,
        BLOCK=MERGE_BLOCK,
        SCALE=scale is not None,
        ROW_SCALE=row_scale is not None,
        BIAS=bias is not None,
        num_warps=2,
    )


class GpuLinear:
    """A weight as it is stored: own kernels for few rows, the library's product for more."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, programmatic: bool = False) -> None:
        self._weight, self._bias, self._programmatic = weight.contiguous(), bias, programmatic

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if len(x) > SOME or x.dtype is torch.float32 or x.shape[1] == 0:
            return F.linear(x, self._weight, self._bias)
        return small_product(x, self._weight, self._bias, programmatic=self._programmatic)
