"""Self-attention over the paged KV pool, for this rank's heads."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import HeadCut, Span
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.batch import Batch
from phalanx.workers.cache import LayerCache
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .linear import ColumnParallelLinear, Output, RowParallelLinear


def _elements(heads: Span, head_dim: int) -> Span:
    return Span(heads.start * head_dim, heads.stop * head_dim)


class Attention:
    """x [T, hidden] -> [T, hidden]; writes this step's keys and values before it attends."""

    def __init__(
        self,
        model: DecoderSpec,
        heads: HeadCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._backend = backend
        self._heads, self._kv_heads = heads.query.size, heads.kv.size
        self._head_dim = dim = model.head_dim
        self._scale = dim**-0.5
        query, kv = _elements(heads.query, dim), _elements(heads.kv, dim)
        self.qkv = ColumnParallelLinear(
            model.hidden_size,
            [
                Output(names.query, query, names.query_bias, head_dim=dim),
                Output(names.key, kv, names.key_bias, head_dim=dim),
                Output(names.value, kv, names.value_bias),
            ],
            dtype,
            device,
        )
        self.output = RowParallelLinear(
            names.output, query, model.hidden_size, group, dtype, device, names.output_bias
        )

    def __call__(self, x: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Attend with the step's positions and pages."""
        tokens = len(x)
        rotated = self._heads + self._kv_heads
        heads = self.qkv(x).view(tokens, rotated + self._kv_heads, self._head_dim)
        turned = self._backend.rope(heads[:, :rotated], batch.cos, batch.sin)
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        self._backend.store_kv(key, heads[:, rotated:], cache.key, cache.value, batch.slots)
        attended = self._backend.paged_attention(
            query, cache.key, cache.value, batch.attention, self._scale
        )
        return self.output(attended.reshape(tokens, self._heads * self._head_dim))
