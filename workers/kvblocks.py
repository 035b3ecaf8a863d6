"""Whole KV blocks as bytes: a rank's layers and heads of them, out of the pool and into it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUT_VERSION = 1
"""Of the bytes of a block: raises when kernels come to keep keys and values in another order."""


def checksum(data: Tensor) -> int:
    """CRC-32 of a uint8 tensor in host memory."""
    return zlib.crc32(data.numpy().data)


class BlockBytes:
    """Blocks of one pool, [layers, 2, local kv heads, blocks, block_size, width].

    A block's bytes are its elements in the order of these dimensions. Where the device queues its
    work, so do `read` and `write`, on the current stream.
    """

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        layers, two, heads, _, size, width = pool.shape
        self._shape = (layers, two, heads, size, width)
        self.num_bytes = layers * two * heads * size * width * pool.element_size()

    def new(self, count: int) -> Tensor:
        """Room for `count` blocks in host memory, uint8 [count, num_bytes]; page-locked where a
        device copies by itself."""
        pinned = self._pool.device.type == "cuda"
        return torch.empty(count, self.num_bytes, dtype=torch.uint8, pin_memory=pinned)

    def read(self, blocks: Sequence[int], into: Tensor) -> None:
        """Copy blocks out, to uint8 [len(blocks), num_bytes]."""
        for block, data in zip(blocks, into, strict=True):
            self._typed(data).copy_(self._pool[:, :, :, block], non_blocking=True)

    def write(self, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks in, from uint8 [len(blocks), num_bytes]."""
        for block, one in zip(blocks, data, strict=True):
            self._pool[:, :, :, block].copy_(self._typed(one), non_blocking=True)

    def _typed(self, data: Tensor) -> Tensor:
        return data.view(self._pool.dtype).view(self._shape)
