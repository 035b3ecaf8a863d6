"""This rank's part of the paged KV pool: its own heads of every block, layer by layer."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.float8 import FLOAT8
from phalanx.kernels.fused import PoolArranger
from phalanx.kernels.int8 import pool_width
from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import Span, Stage, StateCut, convolved_channels
from phalanx.protos.specs import CacheSpec, DecoderSpec, StateSpec
from phalanx.protos.steps import BlockCopy

from .kvblocks import BlockBytes


class LayerState(NamedTuple):
    """What the state spaces of one layer carry on, by slot."""

    window: Tensor
    """The last inputs of the convolution, [num_states, conv_width - 1, local channels]."""
    state: Tensor
    """float32 [num_states, local units, unit_size, state_size]."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [local kv heads, num_blocks, block_size, head_dim] or as
    the kernels arrange that memory; in int8, with the bytes of a scale behind every head_dim
    levels. A layer that has states in place of them has empty ones."""

    key: Tensor
    value: Tensor
    state: LayerState | None = None


class StatePool:
    """The states of the `layers` layers here that have them. Which slot holds what is decided elsewhere."""

    def __init__(
        self,
        state: StateSpec,
        part: StateCut,
        layers: int,
        num_states: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        window = (layers, num_states, state.conv_width - 1, convolved_channels(state, part))
        sizes = (layers, num_states, part.units.size, state.unit_size, state.state_size)
        self._windows = torch.zeros(window, dtype=dtype, device=device)
        self._states = torch.zeros(sizes, device=device)
        pairs = zip(self._windows, self._states, strict=True)
        self.layers = [LayerState(window, state) for window, state in pairs]

    @property
    def num_bytes(self) -> int:
        """Size of the pool in bytes."""
        pools = (self._windows, self._states)
        return sum(pool.numel() * pool.element_size() for pool in pools)


class PagedCache:
    """The pools of all layers. Which block holds what is decided elsewhere, never here."""

    def __init__(
        self,
        spec: CacheSpec,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        spare_blocks: int = 0,
        arrange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """spare_blocks: so many behind those of `spec`, which no plan names. arrange: how the
        kernels want the pools of a layer."""
        dtype = FLOAT8 if spec.dtype == "fp8" else getattr(torch, spec.dtype)
        width = pool_width(head_dim, dtype)
        blocks = spec.num_blocks + spare_blocks
        shape = (num_layers, 2, kv_heads, blocks, spec.block_size, width)
        # zeros, not empty: a masked position must never turn stale bits into NaN
        self._pool = _zeros(shape, dtype, device)
        arrange = arrange or (lambda keys, values: (keys, values))
        self.layers = [LayerCache(*arrange(layer[0], layer[1])) for layer in self._pool]

    @property
    def num_bytes(self) -> int:
        """Size of the pool in bytes."""
        return self._pool.numel() * self._pool.element_size()

    @property
    def arrangement(self) -> list[tuple[int, ...]]:
        """How kernels see the keys and values of a head's block: what its bytes mean."""
        return [
            tuple(pool.shape[2:]) for layer in self.layers[:1] for pool in (layer.key, layer.value)
        ]

    @property
    def blocks(self) -> BlockBytes:
        """Whole blocks, as bytes."""
        return BlockBytes(self._pool)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks, in order, in every layer."""
        for copy in copies:
            self._pool[:, :, :, copy.target] = self._pool[:, :, :, copy.source]

    @property
    def layout(self) -> str:
        """How a head's block lies in memory; bytes go only where it is the same."""
        first = self.layers[0] if self.layers else LayerCache(self._pool, self._pool)
        shapes = [f"{pool.dtype}{[*pool.shape[2:]]}{[*pool.stride()[2:]]}" for pool in first[:2]]
        return "/".join(shapes)

    def piece_bytes(self, layers: int, heads: int) -> int:
        """Bytes of so many layers and key/value heads of a block."""
        _, _, _, _, size, width = self._pool.shape
        return layers * 2 * heads * size * width * self._pool.element_size()

    def read_piece(self, block: int, layers: Span, heads: Span) -> memoryview:
        """A copy of some layers and heads of a block, as they are counted here, in host memory."""
        part = self._pool[slice(*layers), :, slice(*heads), block]
        whole = part.clone(memory_format=torch.contiguous_format).cpu()
        return whole.flatten().view(torch.uint8).numpy().data

    def write_piece(self, block: int, layers: Span, heads: Span, data: bytearray) -> None:
        """Fill some layers and heads of a block with what `read_piece` gave."""
        part = self._pool[slice(*layers), :, slice(*heads), block]
        part.copy_(torch.frombuffer(data, dtype=self._pool.dtype).view(part.shape))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take a host's memory, and the time to clear it, as they are first written: whole
    pools at once would be half a second a GiB before a rank can serve."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def pool_arrangement(
    backend: KernelBackend, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """How a backend wants the pools that queries of `dtype` read; None = plain."""
    if not isinstance(backend, PoolArranger):
        return None
    return lambda keys, values: backend.arrange_pools(keys, values, dtype)


def layer_caches(
    model: DecoderSpec, stage: Stage, pages: PagedCache, states: StatePool | None
) -> list[LayerCache]:
    """What each layer of a stage keeps, in order."""
    own = iter(pages.layers)
    carried = iter(states.layers if states is not None else ())
    none = LayerCache(torch.empty(0), torch.empty(0))
    return [
        none._replace(state=next(carried)) if model.has_state(layer) else next(own)
        for layer in range(*stage.layers)
    ]
