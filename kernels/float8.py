"""Float8 (e4m3) numbers: what a row becomes, and how a backend takes part. Plain torch, the specification.

A row x is kept as float8 levels and one float32 scale:

    scale = max |x| / 448,    level = float8(x / scale),    x ~ level * scale

Rows are the inputs of each output of a weight, once, when it is packed; and the inputs of a product,
token by token as they come, by the norm or the gate before it where that can (`Float8Rows`). A row
with a number that is not finite has the scale NaN. Keys and values have no scale: they are of a size
that float8 holds, and what is beyond its largest number becomes that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .interface import KernelBackend, PackedLinear

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
LEAST_PEAK = 1e-12
"""Of a row's largest magnitude, so that rows of zeros have a scale."""
PACKED_AT_ONCE = 1 << 26
"""Weights that are float32 at a time while they are packed."""


@dataclass(frozen=True, slots=True, eq=False)
class Float8Rows:
    """Rounded rows, inputs of a product."""

    levels: Tensor
    """float8 [T, n]."""
    scales: Tensor
    """float32 [T, 1]."""
    dtype: torch.dtype
    """Of the rows before they were rounded, and of the product."""

    def __len__(self) -> int:
        return len(self.levels)


@runtime_checkable
class Float8Linear(PackedLinear, Protocol):
    """A packed weight whose inputs may come rounded."""

    def of_rows(self, rows: Float8Rows) -> Tensor:
        """Rows [T, in] -> [T, out]; given x, the product rounds it to rows itself."""


@runtime_checkable
class Float8Backend(KernelBackend, Protocol):
    """A backend that multiplies in float8, and rounds where it norms and gates."""

    def pack_linear_fp8(self, weight: Tensor, bias: Tensor | None) -> Float8Linear:
        """As `pack_linear`, with weight and inputs rounded to float8, for sizes of any kind.

        y[t, o] = scale_x[t] * scale_w[o] * sum_i level_x[t, i] * level_w[o, i] + bias[o]
        """

    def add_rms_norm_quantize(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Float8Rows, Tensor]:
        """`add_rms_norm`, its first result rounded."""

    def gated_quantize(self, gate_up: Tensor, activation: str) -> Float8Rows:
        """`gated`, rounded."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [T, n] as (float8 [T, n], float32 scales [T, 1])."""
    wide = x.float()
    if not wide.shape[1]:
        return wide.to(FLOAT8), wide.new_ones(len(wide), 1)
    peak = wide.abs().amax(-1, keepdim=True)
    scale = peak.clamp(min=LEAST_PEAK) / FLOAT8_MAX
    broken = ~(wide.abs() < torch.inf).all(-1, keepdim=True)
    levels = (wide / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX)
    return levels.to(FLOAT8), scale.masked_fill(broken, torch.nan)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize`, some rows at a time: a wide copy of all would be twice the weight."""
    levels = torch.empty(weight.shape, dtype=FLOAT8, device=weight.device)
    scales = torch.empty(len(weight), 1, device=weight.device)
    step = max(PACKED_AT_ONCE // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        levels[part], scales[part] = quantize(weight[part])
    return levels, scales


def multiply(rows: Float8Rows, levels: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """The product of rounded rows and a rounded weight, its sums in float64."""
    sums = rows.levels.double() @ levels.double().T
    product = sums.float() * (rows.scales * scales.T)
    return (product if bias is None else product + bias.float()).to(rows.dtype)


def clamped(x: Tensor) -> Tensor:
    """Keys or values as float8, without a scale."""
    return x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
