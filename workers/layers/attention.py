"""Self-attention over the paged KV pool, for this rank's heads."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.fused import HeadFusingBackend, HeadNorms
from phalanx.kernels.interface import AttentionSpec, KernelBackend
from phalanx.protos.shards import HeadCut, Span
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.batch import Batch
from phalanx.workers.cache import LayerCache
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import NO_LAYOUTS, PLAIN, Layouts
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .linear import ColumnParallelLinear, Output, RowParallelLinear, Rows
from .norm import QueryKeyNorm


def _elements(heads: Span, head_dim: int) -> Span:
    return Span(heads.start * head_dim, heads.stop * head_dim)


class Attention:
    """x [T, hidden] -> [T, hidden]; writes this step's keys and values before it attends.

    With `reduce` off, each rank gives its part of the sum over the group.
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
        self._backend = backend
        self._heads, self._kv_heads = heads.query.size, heads.kv.size
        self._head_dim, self._clip = model.head_dim, model.qkv_clip
        rope = model.rope_of(layer)
        self._rotates, self._local = rope is not None, rope is model.local_rope
        self._spec = _spec(model, heads, layer, device)
        self._sinks: Piece | None = None
        if self._spec.sinks is not None:
            self._sinks = Piece(names.sinks, self._spec.sinks, heads.query)
        query = _elements(heads.query, model.head_dim)
        self.qkv = _projections(model, heads, names, layouts, dtype, device)
        self._norm: QueryKeyNorm | None = None
        if model.qk_norm != "none":
            layout = layouts.get("query_norm", PLAIN)
            self._norm = QueryKeyNorm(model, heads, names, group, backend, dtype, device, layout)
        self._fused, self._norms = self._fusing(model, backend)
        self.output = RowParallelLinear(
            names.output,
            query,
            model.hidden_size,
            group,
            dtype,
            device,
            names.output_bias,
            layout=layouts.get("output", PLAIN),
            reduce=reduce,
        )

    def _fusing(
        self, model: DecoderSpec, backend: KernelBackend
    ) -> tuple[HeadFusingBackend | None, HeadNorms | None]:
        """The backend, if it takes these heads in one go, and their norms."""
        if not self._rotates or not isinstance(backend, HeadFusingBackend):
            return None, None
        if self._norm is None:
            return backend, None
        if model.norm != "rms" or model.qk_norm == "width":
            return None, None
        return backend, HeadNorms(*self._norm.weights, model.norm_eps, model.norm_offset)

    @property
    def spec(self) -> AttentionSpec:
        """How scores are weighed."""
        return self._spec

    @property
    def head_norms(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The weights of the query and key norms."""
        return (None, None) if self._norm is None else self._norm.weights

    @property
    def rotation(self) -> int | None:
        """Which of a batch's angles turn the heads: 0 those of most layers, 1 the local ones."""
        return int(self._local) if self._rotates else None

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers, in the order of their use."""
        return [self.qkv, self.output]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill beside the linear layers."""
        pieces = self._norm.pieces if self._norm else []
        return pieces if self._sinks is None else [*pieces, self._sinks]

    @property
    def takes_float8(self) -> bool:
        """Whether x may come rounded."""
        return self.qkv.takes_float8

    def __call__(self, x: Rows, batch: Batch, cache: LayerCache) -> Tensor:
        """Attend with the step's positions and pages."""
        tokens = len(x)
        rotated = self._heads + self._kv_heads
        projected = self.qkv(x)
        if self._clip:
            projected = projected.clamp(-self._clip, self._clip)
        if self._fused is not None:
            query = self._fused.rope_store_kv(
                projected, *self._angles(batch), cache.key, cache.value, batch.slots, self._norms
            )
        else:
            heads = projected.view(tokens, rotated + self._kv_heads, self._head_dim)
            if self._norm is None:
                turned = self._turned(heads[:, :rotated], batch)
                query, key = turned[:, : self._heads], turned[:, self._heads :]
            else:
                query, key = self._norm(heads[:, : self._heads], heads[:, self._heads : rotated])
                query, key = self._turned(query, batch), self._turned(key, batch)
            self._backend.store_kv(key, heads[:, rotated:], cache.key, cache.value, batch.slots)
        attended = self._backend.paged_attention(
            query, cache.key, cache.value, batch.attention, self._spec
        )
        return self.output(attended.reshape(tokens, self._heads * self._head_dim))

    def _turned(self, heads: Tensor, batch: Batch) -> Tensor:
        if not self._rotates:
            return heads
        return self._backend.rope(heads, *self._angles(batch))

    def _angles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.local if self._local and batch.local else (batch.cos, batch.sin)


def _projections(
    model: DecoderSpec,
    heads: HeadCut,
    names: LayerNames,
    layouts: Layouts,
    dtype: torch.dtype,
    device: torch.device,
) -> ColumnParallelLinear:
    """Queries, keys and values in one product."""
    dim, rotary = model.head_dim, model.rope.rotary_dim if model.rope else None
    query, kv = _elements(heads.query, dim), _elements(heads.kv, dim)
    outputs = [
        Output(names.query, query, names.query_bias, dim, rotary, layouts.get("query", PLAIN)),
        Output(names.key, kv, names.key_bias, dim, rotary, layouts.get("key", PLAIN)),
        Output(names.value, kv, names.value_bias, layout=layouts.get("value", PLAIN)),
    ]
    return ColumnParallelLinear(model.hidden_size, outputs, dtype, device)


def _spec(model: DecoderSpec, heads: HeadCut, layer: int, device: torch.device) -> AttentionSpec:
    slopes = model.alibi_slopes[heads.query.start : heads.query.stop]
    # float32 always: one number a head, and the scores beside it are float32
    sinks = torch.empty(heads.query.size, device=device) if model.attention_sinks else None
    scale = model.head_dim**-0.5 if model.attention_scale is None else model.attention_scale
    return AttentionSpec(
        scale=scale,
        window=model.window(layer),
        softcap=model.attention_softcap,
        alibi_slopes=torch.tensor(slopes, device=device) if model.alibi_slopes else None,
        sinks=sinks,
    )
