"""The one decoder: a stack of layers described by `DecoderSpec`, written for one device.

Parallelism is inside the layer types; nothing here knows how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import RankCut, cut_model
from phalanx.protos.specs import DecoderSpec

from .batch import Batch
from .cache import LayerCache
from .layers.attention import Attention
from .layers.embedding import VocabParallelEmbedding, VocabParallelHead, VocabTable
from .layers.linear import ColumnParallelLinear, RowParallelLinear
from .layers.mlp import GatedMLP
from .loading.pieces import Piece
from .models.registry import LayerNames, ModelNames
from .parallel import TensorParallel


class Norm:
    """The weight of one RMSNorm."""

    def __init__(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.pieces = [Piece(name, self.weight)]


class DecoderLayer:
    """Pre-norm attention and feed-forward, the residual sum carried beside them."""

    def __init__(
        self,
        model: DecoderSpec,
        part: RankCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._backend, self._eps = backend, model.norm_eps
        self.input_norm = Norm(names.input_norm, model.hidden_size, dtype, device)
        self.attention = Attention(model, part.heads, names, group, backend, dtype, device)
        self.post_norm = Norm(names.post_norm, model.hidden_size, dtype, device)
        self.mlp = GatedMLP(model, part.mlp, names, group, backend, dtype, device)

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The layer's linear layers, in the order of their use."""
        attention, mlp = self.attention, self.mlp
        return [attention.qkv, attention.output, mlp.gate_up, mlp.down]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill."""
        norms = [*self.input_norm.pieces, *self.post_norm.pieces]
        return norms + [piece for linear in self.linears for piece in linear.pieces]

    def __call__(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """(block output [T, hidden], residual before it is added)."""
        norm, eps = self._backend.add_rms_norm, self._eps
        x, residual = norm(x, residual, self.input_norm.weight, eps)
        x = self.attention(x, batch, cache)
        x, residual = norm(x, residual, self.post_norm.weight, eps)
        return self.mlp(x), residual


class Decoder:
    """Token ids -> logits of this rank's vocabulary rows."""

    def __init__(
        self,
        model: DecoderSpec,
        names: ModelNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        part = cut_model(model, group.size, group.rank)
        self._backend, self._eps, self._tied = backend, model.norm_eps, model.tie_embeddings
        self.vocab = part.vocab
        table = VocabTable(names.embedding, part.vocab, model.hidden_size, dtype, device)
        self._tables = [table]
        self._embedding = VocabParallelEmbedding(table, group)
        if not model.tie_embeddings:
            table = VocabTable(names.head, part.vocab, model.hidden_size, dtype, device)
            self._tables.append(table)
        self._head = VocabParallelHead(table)
        self._final_norm = Norm(names.final_norm, model.hidden_size, dtype, device)
        self.layers = [
            DecoderLayer(model, part, names.layer(index), group, backend, dtype, device)
            for index in range(model.num_layers)
        ]

    @property
    def stages(self) -> list[list[Piece]]:
        """What the checkpoint must fill, in pieces that are loaded and packed together."""
        tables = [piece for table in self._tables for piece in table.pieces]
        return [tables + self._final_norm.pieces, *(layer.pieces for layer in self.layers)]

    def pack(self, stage: int) -> None:
        """Hand the weights of a filled stage to the backend; stage 0 is embedding and head."""
        if stage == 0:
            self._head.pack(self._backend, shared=self._tied)
            return
        for linear in self.layers[stage - 1].linears:
            linear.pack(self._backend)

    def __call__(self, batch: Batch, cache: Sequence[LayerCache]) -> Tensor:
        """Logits [len(batch.logit_rows), local vocabulary]."""
        x = self._embedding(batch.token_ids)
        residual = torch.zeros_like(x)
        for layer, pages in zip(self.layers, cache, strict=True):
            x, residual = layer(x, residual, batch, pages)
        x, residual = x[batch.logit_rows], residual[batch.logit_rows]
        x, _ = self._backend.add_rms_norm(x, residual, self._final_norm.weight, self._eps)
        return self._head(x)
