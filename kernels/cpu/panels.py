"""KV pools in panels: blocks laid out as attention reads them (native/panels.inl, byte_panels.inl).

A pool in panels has five dimensions, a plain one four; that is how they are told apart. The
bytes of a block stay together, so whoever copies whole blocks need not know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.int8 import SCALE_BYTES

from .library import BYTE_PANELS, MOST_DIM, PANELS, POOL_TYPES

_RUN = 16
"""Keys that stand side by side: kRun."""
_SLICE = 32
"""Dimensions of a value that are read at once: kPanel."""
_ZERO = 128
"""What 0 is in keys of a pool of bytes: kUnsigned."""


def as_panels(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The memory of a layer's pools [K, blocks, block_size, D], seen as panels where these fit:
    keys [K, blocks, D / 2, block_size, 2], values [K, blocks, block_size / 2, D, 2].

    Of int8, with W = D + 4: keys [K, blocks, W / 4, block_size, 4], whose last row are the scales,
    values [K, blocks, block_size / 4, W, 4], a block's last `block_size` words being the scales.
    """
    heads, blocks, block_size, width = keys.shape
    if keys.dtype is torch.bfloat16:
        dim, packed = width, 2
    elif keys.dtype is torch.int8:
        dim, packed = width - SCALE_BYTES, 4
    else:
        return keys, values
    fits = block_size % _RUN == 0 and dim % _SLICE == 0 and 0 < dim <= MOST_DIM
    if not fits or not keys.is_contiguous():
        return keys, values
    return (
        keys.view(heads, blocks, width // packed, block_size, packed),
        values.view(heads, blocks, block_size // packed, width, packed),
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
    """Plain copies [K, blocks, block_size, row width] of pools in panels."""
    if keys.dtype is not torch.int8:
        return keys.permute(0, 1, 3, 2, 4).flatten(3), values.permute(0, 1, 2, 4, 3).flatten(2, 3)
    block_size, dim = block_tokens(keys), row_width(keys) - SCALE_BYTES
    place, of_levels = keys.shape[:2], block_size * dim
    parts = []
    for pool in (keys, values):
        flat = pool.flatten(2)
        words = flat[:, :, :of_levels].reshape(*place, -1, block_size if pool is keys else dim, 4)
        if pool is keys:
            levels = (words ^ -_ZERO).transpose(2, 3).flatten(3)
        else:
            levels = words.transpose(3, 4).flatten(2, 3)
        scales = flat[:, :, of_levels:].reshape(*place, block_size, SCALE_BYTES)
        parts.append(torch.cat([levels, scales], dim=3))
    return parts[0], parts[1]


def pool_type(pool: Tensor) -> int | None:
    """What the library calls such a pool; None where it does not know it."""
    if in_panels(pool):
        return BYTE_PANELS if pool.dtype is torch.int8 else PANELS
    return POOL_TYPES.get(pool.dtype)
