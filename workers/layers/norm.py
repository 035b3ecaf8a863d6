"""Norms of hidden states, and of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.float8 import Float8Backend
from phalanx.kernels.fused import PeerBuffers, PeerRoundingBackend, PeerSummingBackend
from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import HeadCut, Span
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import PLAIN, Layout
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.models.shapes import bias_name
from phalanx.workers.parallel import PeerMemory, TensorParallel

from .linear import Rows


class Norm:
    """The weight and bias of one norm, whole on every rank. Without a model: a weight."""

    def __init__(
        self,
        name: str,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        model: DecoderSpec | None = None,
        layout: Layout = PLAIN,
    ) -> None:
        self.weight = self.bias = None
        self.pieces: list[Piece] = []
        if model is None or model.norm_affine:
            self.weight = torch.empty(size, dtype=dtype, device=device)
            self.pieces.append(Piece(name, self.weight, layout=layout))
        if model is not None and model.norm_bias:
            self.bias = torch.empty(size, dtype=dtype, device=device)
            self.pieces.append(Piece(bias_name(name), self.bias))


class Normalize:
    """Applies the norms of one model, by its rule."""

    def __init__(
        self, model: DecoderSpec, backend: KernelBackend, group: TensorParallel | None = None
    ) -> None:
        """group: only `add_sum` needs it."""
        self._group = group
        self._rms, self._eps, self._offset = model.norm == "rms", model.norm_eps, model.norm_offset
        self._backend = backend

    def __call__(self, x: Tensor, norm: Norm) -> Tensor:
        """The norm of x over its last dimension."""
        return self.weighted(x, norm.weight, norm.bias)

    def weighted(self, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """The norm of x with a weight of its last dimension or last two."""
        if self._rms and weight is not None:
            return self._backend.rms_norm(x, weight, self._eps, self._offset)
        if weight is not None and self._offset:
            weight = weight + self._offset
        return self._backend.layer_norm(x, weight, bias, self._eps)

    def add(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); may overwrite both inputs."""
        if self._rms and norm.weight is not None:
            return self._backend.add_rms_norm(x, residual, norm.weight, self._eps, self._offset)
        residual = x + residual
        return self(residual, norm), residual

    def add_rows(
        self, x: Tensor, residual: Tensor, norm: Norm, *, rounded: bool
    ) -> tuple[Rows, Tensor]:
        """As `add`; if `rounded`, the norm is rounded to float8 in the same kernel, where the
        backend has one."""
        backend = self._backend
        if not rounded or not isinstance(backend, Float8Backend):
            return self.add(x, residual, norm)
        if not self._rms or norm.weight is None:
            return self.add(x, residual, norm)
        return backend.add_rms_norm_quantize(x, residual, norm.weight, self._eps, self._offset)

    def add_sum(self, part: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """As `add` of the ranks' sum of `part`; in one kernel, where group and backend can."""
        group, backend = self._group, self._backend
        if group is None or group.size == 1:
            return self.add(part, residual, norm)
        if norm.weight is not None and isinstance(backend, PeerSummingBackend):
            peers = self._peers(group, part)
            if peers is not None:
                return backend.all_reduce_add_rms_norm(
                    peers, residual.contiguous(), norm.weight, self._eps, self._offset
                )
        return self.add(group.all_reduce(part), residual, norm)

    def add_sum_rows(
        self, part: Tensor, residual: Tensor, norm: Norm, *, rounded: bool
    ) -> tuple[Rows, Tensor]:
        """`add_sum` as `add_rows`."""
        group, backend = self._group, self._backend
        if group is None or group.size == 1:
            return self.add_rows(part, residual, norm, rounded=rounded)
        if not rounded:
            return self.add_sum(part, residual, norm)
        if norm.weight is not None and isinstance(backend, PeerRoundingBackend):
            peers = self._peers(group, part)
            if peers is not None:
                return backend.all_reduce_add_rms_norm_quantize(
                    peers, residual.contiguous(), norm.weight, self._eps, self._offset
                )
        return self.add_rows(group.all_reduce(part), residual, norm, rounded=rounded)

    def _peers(self, group: TensorParallel, part: Tensor) -> PeerBuffers | None:
        return group.filled(part) if self._rms and isinstance(group, PeerMemory) else None


class QueryKeyNorm:
    """Norms the heads of queries [T, H, D] and keys [T, K, D], before they are rotated."""

    def __init__(
        self,
        model: DecoderSpec,
        heads: HeadCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout = PLAIN,
    ) -> None:
        self._model, self._group = model, group
        self._normalize = Normalize(model, backend)
        # of the ranks that share a key/value head, the one with its first query counts it
        self._counts_key = heads.query.start * model.num_kv_heads == (
            heads.kv.start * model.num_heads
        )
        self.pieces: list[Piece] = []
        self._query, self._key = (
            self._weight(name, span, total, dtype, device, layout)
            for name, span, total in (
                (names.query_norm, heads.query, model.num_heads),
                (names.key_norm, heads.kv, model.num_kv_heads),
            )
        )

    def _weight(
        self,
        name: str,
        heads: Span,
        total: int,
        dtype: torch.dtype,
        device: torch.device,
        layout: Layout,
    ) -> Tensor:
        kind, dim = self._model.qk_norm, self._model.head_dim
        rotary = self._model.rope.rotary_dim if self._model.rope else None
        if kind == "head":
            weight = torch.empty(dim, dtype=dtype, device=device)
            self.pieces.append(Piece(name, weight, head_dim=dim, rotary_dim=rotary, layout=layout))
            return weight
        weight = torch.empty(heads.size, dim, dtype=dtype, device=device)
        if kind == "width":
            rows = Span(heads.start * dim, heads.stop * dim)
            self.pieces.append(
                Piece(name, weight.view(-1), rows, head_dim=dim, rotary_dim=rotary, layout=layout)
            )
            return weight
        if layout.heads_as_rows:
            self.pieces.append(
                Piece(name, weight, heads, head_dim=dim, rotary_dim=rotary, layout=layout)
            )
            return weight
        for head in range(total):
            # the weights of other ranks' heads are accounted for, but not read
            mine = heads.start <= head < heads.stop
            target = weight[head - heads.start] if mine else weight.new_empty(0)
            part = None if mine else Span(0, 0)
            own = name.replace("{head}", str(head))
            self.pieces.append(
                Piece(own, target, part, head_dim=dim, rotary_dim=rotary, layout=layout)
            )
        return weight

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Of queries and of keys."""
        return self._query, self._key

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed."""
        if self._model.qk_norm == "width":
            return self._over_all_heads(query, key)
        norm = self._normalize.weighted
        return norm(query, self._query), norm(key, self._key)

    def _over_all_heads(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """RMS over the heads of all ranks: their squares are summed over the group."""
        model = self._model
        squares = [x.float().square().sum((1, 2)) for x in (query, key)]
        squares[1] = squares[1] * self._counts_key
        sums = self._group.all_reduce(torch.stack(squares))
        sizes = (model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim)
        normed = []
        for x, total, size, weight in zip(
            (query, key), sums, sizes, (self._query, self._key), strict=True
        ):
            scale = torch.rsqrt(total / size + model.norm_eps)[:, None, None]
            normed.append((weight * (x.float() * scale)).to(x.dtype))
        return normed[0], normed[1]
