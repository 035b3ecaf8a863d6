"""Linear layers with 4-bit weights: a scale for each group of 128 inputs of an output (W4A16).

Shapes: x [M, K], words int32 [N, G * 16], scales [N, G] in x's dtype -> [M, N], of G = ceil(K / 128)
groups, the last one filled up with zeros. A weight is (nibble - 8) * scale. Bytes moved: half a byte
a weight, once, and 2 for each group.

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

from phalanx.kernels.int4 import GROUP, quantize

from .conversion import product, rounded
from .launch import launch
from .linear import merge_parts

NIBBLES, WORDS = 8, 16  # weights of a word, words of a group
PACKED_AT_ONCE = 1 << 24  # weights that are int64 at a time while they are packed
MOST = 64
"""Rows up to which weights are unpacked in registers."""
BLOCK_N, GROUPS, WARPS, STAGES = 64, 2, 4, 3
"""Outputs and groups of a tile: 64 x 32 words are 8 KB, 16 words a thread."""
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


@triton.jit
def _weights(words, scale, shift, DTYPE: tl.constexpr):
    """One nibble of each word [n, words] as a weight, scales float32 [n, words]."""
    nibble = ((words >> shift) & 15).to(tl.float32)
    return rounded((nibble - 8.0) * scale, DTYPE)


@triton.jit
def _multiply(
    x_ptr, words_ptr, scale_ptr, parts_ptr, rows, outputs, inputs, x_stride, split, groups,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
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
        scale = tl.load(scale_ptr + at, inside, 0.0).to(tl.float32)
        for nibble in tl.static_range(8):
            column = (group * 128 + nibble * 16 + word % 16)[:, None]
            known = (column < inputs) & (row < rows)[None, :]
            x = tl.load(x_ptr + row[None, :] * x_stride + column, known, 0.0)
            total = product(_weights(words, scale, nibble * 4, dtype), x, total)
    to = parts_ptr + (part * rows + row[None, :]) * outputs + output[:, None]
    tl.store(to, total, (row < rows)[None, :] & here)


@triton.jit
def _unpack(
    words_ptr, scale_ptr, out_ptr, outputs, groups, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a group of BLOCK_N outputs as a matrix [N, K]."""
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group, word = tl.program_id(1), tl.arange(0, 16)[None, :]
    inside = (output < outputs)[:, None] & (word < 16)
    wide = output.to(tl.int64)[:, None]
    words = tl.load(words_ptr + wide * groups * 16 + group * 16 + word, inside, 0)
    at = wide * groups + group + word * 0
    scale = tl.load(scale_ptr + at, inside, 0.0).to(tl.float32)
    to = out_ptr + wide * groups * 128 + group * 128 + word
    for nibble in tl.static_range(8):
        weight = _weights(words, scale, nibble * 4, out_ptr.dtype.element_ty)
        tl.store(to + nibble * 16, weight, inside)


def pack_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (words, scales): `kernels.int4`, some rows at a time, in the order above."""
    (outputs, inputs), place = weight.shape, weight.device
    groups = -(-inputs // GROUP)
    words = torch.empty(outputs, groups * WORDS, dtype=torch.int32, device=place)
    scales = torch.empty(outputs, groups, dtype=weight.dtype, device=place)
    shifts = torch.arange(0, 32, 4, device=place).view(NIBBLES, 1)
    count = max(PACKED_AT_ONCE // max(inputs, 1), 1)
    for start in range(0, outputs, count):
        part = slice(start, start + count)
        steps, scales[part] = quantize(weight[part])
        nibbles = (steps.to(torch.int64) + 8).view(len(steps), groups, NIBBLES, WORDS)
        packed = (nibbles << shifts).sum(2)
        words[part] = (packed - ((packed >> 31) << 32)).to(torch.int32).flatten(1)
    return words, scales


class GpuInt4Linear:
    """A weight of 4 bits and its bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [N, K] and bias [N] of the inputs' type."""
        self._inputs = weight.shape[1]
        self._words, self._scales = pack_int4(weight)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        if len(x) <= MOST and self._inputs:
            return self._few(x)
        return F.linear(x, self.unpacked(x.dtype), self._bias)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weights [N, K] as numbers."""
        (outputs, groups), place = self._scales.shape, self._words.device
        out = torch.empty(outputs, groups * GROUP, dtype=dtype, device=place)
        if out.numel():
            launch(_unpack, -(-outputs // BLOCK_N), groups)(
                self._words,
                self._scales,
                out,
                outputs,
                groups,
                BLOCK_N=BLOCK_N,
                num_warps=WARPS,
            )
        return out[:, : self._inputs]

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
            sums,
            rows,
            outputs,
            self._inputs,
            x.stride(0),
            split,
            groups,
            ROWS=16 if rows <= 16 else MOST,
            BLOCK_N=BLOCK_N,
            GROUPS=GROUPS,
            STAGES=STAGES,
            num_warps=WARPS,
        )
        merge_parts(sums, out, self._bias)
        return out
