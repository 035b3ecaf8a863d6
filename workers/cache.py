"""This rank's part of the paged KV pool: its own heads of every block, layer by layer."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.int8 import pool_width
from phalanx.protos.specs import CacheSpec
from phalanx.protos.steps import BlockCopy


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [local kv heads, num_blocks, block_size, head_dim];
    in int8, with the bytes of a scale behind every head_dim levels."""

    key: Tensor
    value: Tensor


class PagedCache:
    """The pools of all layers. Which block holds what is decided elsewhere, never here."""

    def __init__(
        self,
        spec: CacheSpec,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
    ) -> None:
        dtype = getattr(torch, spec.dtype)
        width = pool_width(head_dim, dtype)
        shape = (num_layers, 2, kv_heads, spec.num_blocks, spec.block_size, width)
        # zeros, not empty: a masked position must never turn stale bits into NaN
        self._pool = _zeros(shape, dtype, device)
        self.layers = [LayerCache(layer[0], layer[1]) for layer in self._pool]

    @property
    def num_bytes(self) -> int:
        """Size of the pool in bytes."""
        return self._pool.numel() * self._pool.element_size()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in order, in every layer."""
        for copy in copies:
            self._pool[:, :, :, copy.target] = self._pool[:, :, :, copy.source]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take a host's memory, and the time to clear it, as they are first written: whole
    pools at once would be half a second a GiB before a rank can serve."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
