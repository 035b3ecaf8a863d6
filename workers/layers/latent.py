"""Multi-head latent attention (DeepSeek-AI 2024) over the paged KV pool, for this rank's heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.interface import AttentionSpec, KernelBackend
from phalanx.protos.shards import HeadCut, Span
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.batch import Batch
from phalanx.workers.cache import LayerCache
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import NO_LAYOUTS, PLAIN, Layouts
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .linear import ColumnParallelLinear, Output, RowParallelLinear
from .norm import Norm

EPS = 1e-6
"""Of the norms of the small vectors, whatever the model's other norms have."""


def _rows(heads: Span, size: int) -> Span:
    return Span(heads.start * size, heads.stop * size)


class LatentAttention:
    """x [T, hidden] -> [T, hidden]; keys and values are made from a small vector, then stored.

    The small vectors are computed whole on every rank, the heads made from them are divided. In
    the pool every head has its keys and values, so that attention is that of any model. With
    `reduce` off, each rank gives its part of the sum over the group.
    """

    def __init__(
        self,
        model: DecoderSpec,
        heads: HeadCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layer: int = 0,
        layouts: Layouts = NO_LAYOUTS,
        reduce: bool = True,
    ) -> None:
        latent, hidden = model.latent, model.hidden_size
        if latent is None:
            raise TypeError("the model has no latent attention")
        self._backend, self._heads = backend, heads.query.size
        self._rotated, self._value = model.rotary_dim, latent.value_dim
        self._plain = model.head_dim - self._rotated
        scale = model.attention_scale or model.head_dim**-0.5
        self._spec = AttentionSpec(scale=scale, window=model.window(layer))

        def output(role: str, rows: Span, head_dim: int | None = None) -> Output:
            layout = layouts.get(role, PLAIN)
            return Output(getattr(names, role), rows, head_dim=head_dim, layout=layout)

        queries = [
            output("query_rotated", _rows(heads.query, self._rotated), self._rotated),
            output("query", _rows(heads.query, self._plain)),
        ]
        self._query_norm: Norm | None = None
        self.queries: ColumnParallelLinear | None = None
        if rank := latent.query_rank:
            self._query_norm = Norm(names.query_norm, rank, dtype, device)
            self.queries = ColumnParallelLinear(rank, queries, dtype, device)
            queries = [output("query_latent", Span(0, rank))]
        self._key_norm = Norm(names.key_norm, latent.kv_rank, dtype, device)
        small = [
            output("key_latent", Span(0, latent.kv_rank)),
            output("key_rotated", Span(0, self._rotated), self._rotated),
        ]
        self._sizes = [sum(part.rows.size for part in queries), *(part.rows.size for part in small)]
        self.latents = ColumnParallelLinear(hidden, [*queries, *small], dtype, device)
        both = [
            output("key", _rows(heads.kv, self._plain)),
            output("value", _rows(heads.kv, self._value)),
        ]
        self.keys_values = ColumnParallelLinear(latent.kv_rank, both, dtype, device)
        columns = _rows(heads.query, self._value)
        self.output = RowParallelLinear(
            names.output, columns, hidden, group, dtype, device, reduce=reduce
        )

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers, in the order of their use."""
        queries = [self.queries] if self.queries else []
        return [self.latents, *queries, self.keys_values, self.output]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill beside the linear layers."""
        norms = [self._query_norm, self._key_norm]
        return [piece for norm in norms if norm is not None for piece in norm.pieces]

    def __call__(self, x: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Attend with the step's positions and pages."""
        tokens, heads = len(x), self._heads
        query, latent, key = torch.split(self.latents(x), self._sizes, dim=-1)
        if self.queries is not None:
            query = self.queries(self._normed(query, self._query_norm))
        made = self.keys_values(self._normed(latent, self._key_norm))
        query = self._joined(query[:, : heads * self._rotated], query, batch)
        key = self._joined(key, made[:, : heads * self._plain], batch)
        value = made[:, heads * self._plain :].reshape(tokens, heads, self._value)
        value = F.pad(value, (0, query.shape[-1] - self._value))
        self._backend.store_kv(key, value, cache.key, cache.value, batch.slots)
        attended = self._backend.paged_attention(
            query, cache.key, cache.value, batch.attention, self._spec
        )
        return self.output(attended[..., : self._value].reshape(tokens, heads * self._value))

    def _normed(self, x: Tensor, norm: Norm | None) -> Tensor:
        if norm is None or norm.weight is None:
            return x
        return self._backend.rms_norm(x, norm.weight, EPS)

    def _joined(self, rotated: Tensor, plain: Tensor, batch: Batch) -> Tensor:
        """Heads [T, H, D], the rotated elements first: of every head, or one for all [T, r].

        `plain` ends with the elements of all heads that are not rotated.
        """
        tokens, heads = len(plain), self._heads
        first = rotated.reshape(tokens, -1, self._rotated)
        turned = self._backend.rope(first, batch.cos, batch.sin).expand(-1, heads, -1)
        rest = plain[:, plain.shape[1] - heads * self._plain :]
        return torch.cat([turned, rest.reshape(tokens, heads, self._plain)], dim=-1)
