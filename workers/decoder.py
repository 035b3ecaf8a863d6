"""The one decoder: a stack of layers described by `DecoderSpec`, written for one device.

Parallelism is inside the layer types; nothing here knows how many ranks there are, only which
stage of the layers this is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.kernels.fused import PeerSummingBackend
from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import Stage, cut_model, whole
from phalanx.protos.specs import ROUNDED_DTYPES, DecoderSpec, linear_bytes

from .batch import Batch
from .cache import LayerCache
from .fused import FusedLayers
from .layers.block import DecoderLayer
from .layers.embedding import PositionTable, VocabParallelEmbedding, VocabParallelHead, VocabTable
from .layers.norm import Norm, Normalize
from .loading.pieces import Packable, Piece
from .models.layout import PLAIN
from .models.registry import ModelNames
from .packing import Int8Packer, packer
from .parallel import PeerMemory, TensorParallel


class Decoder:
    """Token ids -> logits of this rank's vocabulary rows; of several stages, each does a part."""

    def __init__(
        self,
        model: DecoderSpec,
        names: ModelNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        stage: Stage | None = None,
        *,
        weights: str | None = None,
    ) -> None:
        """stage: which layers; all, by default. weights: what linear layers, and in int8 the
        head, are rounded to when they are packed."""
        self._packer, self._weights = packer(weights or "", backend), weights
        part = cut_model(model, group.size, group.rank)
        self._stage = stage = stage or whole(model)
        self._dtype, self._device = dtype, device
        self._model, self._backend, self._group, self._part = model, backend, group, part
        self._fused: FusedLayers | None = None
        # rounded to the dtype first, as the models were trained
        self._embedding_scale = torch.tensor(model.embedding_scale, dtype=dtype).item()
        self.vocab, hidden = part.vocab, model.hidden_size
        place = (dtype, device)
        self._tables: list[VocabTable] = []
        self._embedding: VocabParallelEmbedding | None = None
        self._positions: PositionTable | None = None
        self._embedding_norm: Norm | None = None
        if stage.is_first:
            self._tables.append(VocabTable(names.embedding, part.vocab, hidden, *place))
            self._embedding = VocabParallelEmbedding(self._tables[0], group)
            if model.learned_positions:
                rows = model.max_context + model.position_offset
                self._positions = PositionTable(names.positions, rows, hidden, *place)
            if model.embedding_norm:
                self._embedding_norm = Norm(names.embedding_norm, hidden, *place, model=model)
        self._norm = Normalize(model, backend, group)
        deferred = _defers(model, group, backend) and stage.count == 1
        self._add_last = self._norm.add_sum if deferred else self._norm.add
        self._head: VocabParallelHead | None = None
        self._final_norm: Norm | None = None
        if stage.is_last:
            if not (model.tie_embeddings and self._tables):
                bias = None if model.tie_embeddings else names.head_bias
                self._tables.append(VocabTable(names.head, part.vocab, hidden, *place, bias))
            tied = model.tie_embeddings and stage.is_first
            self._head = VocabParallelHead(self._tables[-1], shared=tied)
            layout = names.layouts.get("final_norm", PLAIN)
            self._final_norm = Norm(names.final_norm, hidden, *place, model=model, layout=layout)
        layouts, shared = names.layouts, (group, backend, dtype, device)
        # there may be just room for the rounded weights, and not for all of them as they come
        self._late = weights in ROUNDED_DTYPES
        self.layers: list[DecoderLayer] = []
        for i in range(*stage.layers):
            layer = DecoderLayer(
                model, part, names.layer(i), *shared, layer=i, layouts=layouts, deferred=deferred
            )
            for linear in layer.linears if self._late else ():
                linear.allocate(torch.device("meta"))
            self.layers.append(layer)

    @property
    def carried(self) -> torch.dtype:
        """Of the hidden states that stages hand on: wide enough for all that a CPU carries
        between layers."""
        return torch.float32 if self._device.type == "cpu" else self._dtype

    def open(self, stage: int) -> list[Piece]:
        """The pieces of a stage, laid out to be filled and then packed."""
        if stage and self._late:
            for linear in self.layers[stage - 1].linears:
                if linear.weight is not None:
                    linear.allocate(self._device)
        return self.stages[stage]

    def packables(self, stage: int) -> Sequence[Packable]:
        """What is packed, or adopts what an equal one was packed to, when a stage is."""
        if stage:
            return self.layers[stage - 1].linears
        return [] if self._head is None else [self._head]

    @property
    def tables(self) -> list[VocabTable]:
        """Of stage 0: the embedding, and the head's where it has one of its own."""
        return self._tables

    @property
    def stages(self) -> list[list[Piece]]:
        """What the checkpoint must fill, in pieces that are loaded and packed together; some take
        no memory before they are opened."""
        outer = [*self._tables, self._positions, self._embedding_norm, self._final_norm]
        first = [piece for part in outer if part is not None for piece in part.pieces]
        return [first, *(layer.pieces for layer in self.layers)]

    @property
    def weight_bytes(self) -> int:
        """What the weights will take once they are packed; asked before."""
        pieces = [piece for stage in self.stages for piece in stage]
        total = sum(piece.target.numel() * piece.target.element_size() for piece in pieces)
        if self._weights not in ROUNDED_DTYPES:
            return total
        linears = [linear for layer in self.layers for linear in layer.linears]
        rounded = [linear.weight for linear in linears if not linear.exact]
        if self._head is not None and isinstance(self._packer, Int8Packer):
            head = self._tables[-1].weight
            rounded.append(head)
            total += head.nbytes if self._model.tie_embeddings and self._embedding else 0
        for weight in rounded:
            if weight is not None:
                total += linear_bytes(self._weights, *weight.shape) - weight.nbytes
        return total

    def pack(self, stage: int) -> None:
        """Hand the weights of a filled stage to the backend; stage 0 is embedding and head."""
        if stage == 0:
            if self._head is not None:
                rounds = isinstance(self._packer, Int8Packer)
                self._head.pack(self._packer if rounds else self._backend)
            return
        for linear in self.layers[stage - 1].linears:
            linear.pack(self._backend if linear.exact else self._packer)

    def fuse(self, cache: Sequence[LayerCache]) -> bool:
        """Let the backend run all layers in one call, on these pools, if it can; once packed."""
        self._fused = FusedLayers.of(
            self._model,
            self._part,
            self.layers,
            self._final_norm,
            cache,
            self._group,
            self._backend,
        )
        return self._fused is not None

    def __call__(
        self, batch: Batch, cache: Sequence[LayerCache], before: Tensor | None = None
    ) -> Tensor:
        """Final hidden states of the rows that need logits, [len(batch.logit_rows), hidden].

        before: what the stage before this one has given. All but the last stage give the hidden
        states of all rows, [T, hidden], of type `carried`.
        """
        x = self._embed(batch) if before is None else before
        if self._fused is not None:
            return self._fused(x, batch)
        x = x.to(self._dtype)
        residual = torch.zeros_like(x)
        for layer, pages in zip(self.layers, cache, strict=True):
            x, residual = layer(x, residual, batch, pages)
        if self._final_norm is None:
            return (x + residual).to(self.carried)
        x, residual = (part.index_select(0, batch.logit_rows) for part in (x, residual))
        x, _ = self._add_last(x, residual, self._final_norm)
        return x

    def _embed(self, batch: Batch) -> Tensor:
        if self._embedding is None:
            raise RuntimeError("only the first stage has the embedding")
        model = self._model
        x = self._embedding(batch.token_ids)
        if model.embedding_scale != 1.0:
            x = x * self._embedding_scale
        if self._positions is not None and batch.positions is not None:
            x = x + self._positions(batch.positions + model.position_offset)
        return x if self._embedding_norm is None else self._norm(x, self._embedding_norm)

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of each of `logits`' rows the first largest, as local column and float32 value, which is
        NaN where one is not finite. None where it takes the logits themselves to tell."""
        model, head = self._model, self._head
        if model.logit_scale != 1.0 or model.final_softcap or head is None or not head.finds_best:
            return None
        return head.best(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, local vocabulary]."""
        if self._head is None:
            raise RuntimeError("only the last stage has the head")
        model, logits = self._model, self._head(hidden)
        if model.logit_scale != 1.0:
            logits = logits * model.logit_scale
        if model.final_softcap:
            logits = model.final_softcap * torch.tanh(logits / model.final_softcap)
        return logits


def _defers(model: DecoderSpec, group: TensorParallel, backend: KernelBackend) -> bool:
    """Whether blocks leave their sums over the ranks to the norm that comes next."""
    simple = model.block == "pre" and model.residual_scale == 1.0 and model.norm == "rms"
    return simple and isinstance(group, PeerMemory) and isinstance(backend, PeerSummingBackend)
