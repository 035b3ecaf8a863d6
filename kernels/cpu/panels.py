"""KV pools of bfloat16 in panels: blocks laid out as attention reads them (native/panels.inl).

A pool in panels has five dimensions, a plain one four; that is how they are told apart. The
bytes of a block stay together, so whoever copies whole blocks need not know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import PANELS, POOL_TYPES

_RUN = 16
"""Keys that stand side by side: kRun."""
_SLICE = 32
"""Dimensions of a value that are read at once: kPanel."""


def as_panels(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of a layer's pools [K, blocks, block_size, D], seen as panels where these fit:
    keys [K, blocks, D / 2, block_size, 2], values [K, blocks, block_size / 2, D, 2]."""
    heads, blocks, block_size, dim = keys.shape
    fits = keys.dtype is torch.bfloat16 and block_size % _RUN == 0 and dim % _SLICE == 0
    if not fits or not keys.is_contiguous():
        return keys, values
    return (
        keys.view(heads, blocks, dim // 2, block_size, 2),
        values.view(heads, blocks, block_size // 2, dim, 2),
    )


def in_panels(pool: Tensor) -> bool:
    """Whether the pool is."""
    return pool.dim() == 5


def block_tokens(pool: Tensor) -> int:
    """Tokens of a block of a pool of keys."""
    return pool.shape[3] if in_panels(pool) else pool.shape[2]


def row_width(pool: Tensor) -> int:
    """Elements of a token and head in a pool of keys; with int8, its scale's bytes included."""
    return pool.shape[2] * pool.shape[4] if in_panels(pool) else pool.shape[3]


def from_panels(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Plain copies [K, blocks, block_size, D] of pools in panels."""
    return (
        keys.permute(0, 1, 3, 2, 4).flatten(3),
        values.permute(0, 1, 2, 4, 3).flatten(2, 3),
    )


def pool_type(pool: Tensor) -> int | None:
    """What the library calls such a pool; None where it does not know it."""
    return PANELS if in_panels(pool) else POOL_TYPES.get(pool.dtype)
