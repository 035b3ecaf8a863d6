"""Linear layers with 4-bit weights: a scale for each group of 128 inputs of an output (W4A16).

Shapes: x [M, K], words int32 [N, K / 8], scales [N, K / 128] in x's dtype -> [M, N]. A weight is
(nibble - 8) * scale, or (nibble - zero) * scale with zeros int8 [N, K / 128]. Bytes moved: half a
byte a weight, once, and 2 for each group.

Nibble j of word i of a group is the group's input 16 j + i. So a tile of words, loaded with 16
bytes a thread, unpacks in registers into 8 tiles of weights by a shift each, and tile j meets the
inputs 16 j + i of its groups, which are read in runs of 16: nothing is shuffled between threads.

Up to `MOST` rows: tensor cores, K split and merged in order as in `linear`. More rows compute
enough to pay for unpacking the weights first, into a matrix for the library's product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .conversion import product, rounded
from .launch import launch
from .linear import merge_parts

GROUP, NIBBLES, WORDS = 128, 8, 16  # inputs of a group, weights of a word, words of a group
MOST = 64
"""Rows up to which weights are unpacked in registers."""
BLOCK_N, GROUPS, WARPS, STAGES = 64, 2, 4, 3
"""Outputs and groups of a tile: 64 x 32 words are 8 KB, 16 words a thread."""
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


@triton.jit
def _weights(words, scale, zero, shift, DTYPE: tl.constexpr):
    """One nibble of each word [n, words] as a weight, scale and zero [n, words]."""
    nibble = ((words >> shift) & 15).to(tl.float32)
    return rounded((nibble - zero) * scale, DTYPE)


@triton.jit
def _scales(
    scale_ptr, zero_ptr, at, inside, ZEROS: tl.constexpr
):  # fmt: skip
    """Scale and zero of words, float32."""
    scale = tl.load(scale_ptr + at, inside, 0.0).to(tl.float32)
    if ZEROS:
        zero = tl.load(zero_ptr + at, inside, 0).to(tl.float32)
    else:
        zero = tl.full(scale.shape, 8.0, tl.float32)
    return scale, zero


@triton.jit
def _multiply(
    x_ptr, words_ptr, scale_ptr, zero_ptr, parts_ptr, rows, outputs, x_stride, split, groups,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, ZEROS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N outputs over groups [part * split, (part + 1) * split)."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part, row = tl.program_id(1), tl.arange(0, ROWS)
    word = tl.arange(0, GROUPS * 16)
    here = (output < outputs)[:, None]
    wide = output.to(tl.int64)[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for first in tl.range(part * split, min((part + 1) * split, groups), GROUPS, num_stages=STAGES):
        group = first + word // 16
        inside = here & (group < groups)[None, :]
        words = tl.load(words_ptr + wide * groups * 16 + (first * 16 + word)[None, :], inside, 0)
        at = wide * groups + group[None, :]
        scale, zero = _scales(scale_ptr, zero_ptr, at, inside, ZEROS)
        column = group * 128 + word % 16
        known = (group < groups)[:, None] & (row < rows)[None, :]
        for nibble in tl.static_range(8):
            at = row[None, :] * x_stride + (column + nibble * 16)[:, None]
            x = tl.load(x_ptr + at, known, 0.0)
            total = product(_weights(words, scale, zero, nibble * 4, dtype), x, total)
    to = parts_ptr + (part * rows + row[None, :]) * outputs + output[:, None]
    tl.store(to, total, (row < rows)[None, :] & here)


@triton.jit
def _unpack(
    words_ptr, scale_ptr, zero_ptr, out_ptr, outputs, groups, BLOCK_N: tl.constexpr,
    ZEROS: tl.constexpr,
):  # fmt: skip
    """One program: a group of BLOCK_N outputs as a matrix [N, K]."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group, word = tl.program_id(1), tl.arange(0, 16)[None, :]
    inside = (output < outputs)[:, None] & (word < 16)
    wide = output.to(tl.int64)[:, None]
    words = tl.load(words_ptr + wide * groups * 16 + group * 16 + word, inside, 0)
    at = wide * groups + group + word * 0
    scale, zero = _scales(scale_ptr, zero_ptr, at, inside, ZEROS)
    to = out_ptr + wide * groups * 128 + group * 128 + word
    for nibble in tl.static_range(8):
        weight = _weights(words, scale, zero, nibble * 4, out_ptr.dtype.element_ty)
        tl.store(to + nibble * 16, weight, inside)


def pack_nibbles(values: Tensor) -> Tensor:
    """values [N, K] in [0, 16) -> int32 words [N, K / 8] in the order above."""
    outputs, inputs = values.shape
    if inputs % GROUP:
        raise ValueError(f"int4: {inputs} inputs; they must be a multiple of {GROUP}")
    nibbles = values.to(torch.int64).view(outputs, inputs // GROUP, NIBBLES, WORDS)
    shifts = torch.arange(0, 32, 4, device=values.device).view(NIBBLES, 1)
    words = (nibbles << shifts).sum(2)
    return (words - ((words >> 31) << 32)).to(torch.int32).view(outputs, inputs // NIBBLES)


def pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (words, scales [N, K / 128] of weight's dtype), rounded to the nearest.

    Symmetric: the largest magnitude of a group is 7 steps.
    """
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"int4: {inputs} inputs; they must be a multiple of {GROUP}")
    groups = weight.float().view(outputs, inputs // GROUP, GROUP)
    scale = (groups.abs().amax(-1) / 7).clamp_(min=1e-12).to(weight.dtype)
    steps = (groups / scale.float()[..., None]).round_().clamp_(-8, 7) + 8
    return pack_nibbles(steps.view(outputs, inputs)), scale


class Int4Linear:
    """A weight of 4 bits and its bias."""

    def __init__(
        self, words: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None
    ) -> None:
        self._words, self._scales, self._bias = words.contiguous(), scales.contiguous(), bias
        self._zeros = None if zeros is None else zeros.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        return F.linear(x, self.unpacked(x.dtype), self._bias) if len(x) > MOST else self._few(x)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K] as numbers."""
        (outputs, groups), place = self._scales.shape, self._words.device
        out = torch.empty(outputs, groups * GROUP, dtype=dtype, device=place)
        launch(_unpack, -(-outputs // BLOCK_N), groups)(
            self._words,
            self._scales,
            self._zeros,
            out,
            outputs,
            groups,
            BLOCK_N=BLOCK_N,
            ZEROS=self._zeros is not None,
            num_warps=WARPS,
        )
        return out

    def _few(self, x: Tensor) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        rows, (outputs, groups) = len(x), self._scales.shape
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
        if not rows or not outputs:
            return out
        programs = -(-outputs // BLOCK_N)
        parts = min(-(-PROGRAMS // programs), max(groups // (2 * GROUPS), 1))
        split = -(-groups // parts // GROUPS) * GROUPS or GROUPS
        sums = torch.empty(-(-groups // split), rows, outputs, dtype=torch.float32, device=x.device)
        launch(_multiply, programs, len(sums))(
            x,
            self._words,
            self._scales,
            self._zeros,
            sums,
            rows,
            outputs,
            x.stride(0),
            split,
            groups,
            ROWS=16 if rows <= 16 else MOST,
            BLOCK_N=BLOCK_N,
            GROUPS=GROUPS,
            ZEROS=self._zeros is not None,
            STAGES=STAGES,
            num_warps=WARPS,
        )
        merge_parts(sums, out, self._bias, None)
        return out
