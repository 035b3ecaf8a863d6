"""Eight-bit numbers: what a row becomes, and how a backend takes part. Plain torch, the specification.

A row x is kept as levels, whole numbers of [-127, 127], and one float32 scale:

    scale = max |x| / 127,    level = round(x / scale),    x ~ level * scale

symmetric, so that 0 stays 0. Rows are the inputs of each output of a weight, once, when it is
packed; the inputs of a product, token by token as they come (Yao 2022, ZeroQuant); a token's key or
value of one head, when it is stored. A row with a number that is not finite has the scale NaN.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .float8 import FLOAT8, clamped
from .interface import KernelBackend, PackedLinear

LEVELS = 127
LEAST_PEAK = 1e-30
"""Rows without a greater number are zeros: their levels would overflow on the way."""
SCALE_BYTES = 4


@runtime_checkable
class Int8Backend(KernelBackend, Protocol):
    """A backend that multiplies in int8."""

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """As `pack_linear`, with weight and inputs rounded to int8; their products are exact.

        y[t, o] = scale_x[t] * scale_w[o] * sum_i level_x[t, i] * level_w[o, i] + bias[o], for
        fewer than 2**16 inputs, whose sums fit 32 bits.
        """


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [..., n] as levels int8 [..., n] and scales float32 [...]."""
    wide = x.float()
    if not wide.shape[-1]:
        return wide.to(torch.int8), wide.new_zeros(wide.shape[:-1])
    peak = wide.abs().amax(-1)
    broken = ~wide.isfinite().all(-1)
    usable = (peak > LEAST_PEAK) & ~broken
    inverse = torch.where(usable, LEVELS / peak, 0.0)
    levels = (wide * inverse.unsqueeze(-1)).round_()
    if bool(broken.any()):
        levels.masked_fill_(broken.unsqueeze(-1), 0.0)
    return levels.to(torch.int8), (peak / LEVELS).masked_fill(broken, torch.nan)


def pool_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of one token and head in a KV pool; in int8, the scale's bytes follow the levels."""
    return head_dim + SCALE_BYTES if dtype is torch.int8 else head_dim


def to_pool(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values [..., D] as a KV pool of `dtype` holds them, [..., pool_width]."""
    if dtype is FLOAT8:
        return clamped(rows)
    if dtype is not torch.int8:
        return rows.to(dtype)
    levels, scales = quantize(rows)
    return torch.cat([levels, scales.unsqueeze(-1).view(torch.int8)], dim=-1)


def from_pool(rows: Tensor) -> Tensor:
    """Rows of a KV pool as numbers [..., D]: float32 from 8 bits, others as they are."""
    if rows.dtype is FLOAT8:
        return rows.float()
    if rows.dtype is not torch.int8:
        return rows
    scales = (
        rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    )
    return rows[..., :-SCALE_BYTES].float() * scales
