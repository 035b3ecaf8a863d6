"""The one decoder: a stack of layers described by `DecoderSpec`, written for one device.

Parallelism is inside the layer types; nothing here knows how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import cut_model
from phalanx.protos.specs import DecoderSpec

from .batch import Batch
from .cache import LayerCache
from .fused import FusedLayers
from .layers.block import DecoderLayer
from .layers.embedding import PositionTable, VocabParallelEmbedding, VocabParallelHead, VocabTable
from .layers.norm import Norm, Normalize
from .loading.pieces import Piece
from .models.layout import PLAIN
from .models.registry import ModelNames
from .parallel import TensorParallel


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
        self._model, self._backend, self._group, self._part = model, backend, group, part
        self._fused: FusedLayers | None = None
        self.vocab, hidden = part.vocab, model.hidden_size
        table = VocabTable(names.embedding, part.vocab, hidden, dtype, device)
        self._tables = [table]
        self._embedding = VocabParallelEmbedding(table, group)
        if not model.tie_embeddings:
            table = VocabTable(names.head, part.vocab, hidden, dtype, device, names.head_bias)
            self._tables.append(table)
        self._head = VocabParallelHead(table)
        self._positions: PositionTable | None = None
        if model.learned_positions:
            rows = model.max_context + model.position_offset
            self._positions = PositionTable(names.positions, rows, hidden, dtype, device)
        self._norm = Normalize(model, backend)
        layout = names.layouts.get("final_norm", PLAIN)
        self._final_norm = Norm(names.final_norm, hidden, dtype, device, model=model, layout=layout)
        self._embedding_norm: Norm | None = None
        if model.embedding_norm:
            self._embedding_norm = Norm(names.embedding_norm, hidden, dtype, device, model=model)
        self.layers = [
            DecoderLayer(
                model,
                part,
                names.layer(index),
                group,
                backend,
                dtype,
                device,
                layer=index,
                layouts=names.layouts,
            )
            for index in range(model.num_layers)
        ]

    @property
    def stages(self) -> list[list[Piece]]:
        """What the checkpoint must fill, in pieces that are loaded and packed together."""
        outer = [*self._tables, self._positions, self._embedding_norm, self._final_norm]
        first = [piece for part in outer if part is not None for piece in part.pieces]
        return [first, *(layer.pieces for layer in self.layers)]

    def pack(self, stage: int) -> None:
        """Hand the weights of a filled stage to the backend; stage 0 is embedding and head."""
        if stage == 0:
            self._head.pack(self._backend, shared=self._model.tie_embeddings)
            return
        for linear in self.layers[stage - 1].linears:
            linear.pack(self._backend)

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

    def __call__(self, batch: Batch, cache: Sequence[LayerCache]) -> Tensor:
        """Final hidden states of the rows that need logits, [len(batch.logit_rows), hidden]."""
        x = self._embed(batch)
        if self._fused is not None:
            return self._fused(x, batch)
        residual = torch.zeros_like(x)
        for layer, pages in zip(self.layers, cache, strict=True):
            x, residual = layer(x, residual, batch, pages)
        x, residual = x[batch.logit_rows], residual[batch.logit_rows]
        x, _ = self._norm.add(x, residual, self._final_norm)
        return x

    def _embed(self, batch: Batch) -> Tensor:
        model = self._model
        x = self._embedding(batch.token_ids)
        if model.embedding_scale != 1.0:
            # rounded to the dtype first, as the models were trained
            x = x * torch.tensor(model.embedding_scale, dtype=x.dtype, device=x.device)
        if self._positions is not None and batch.positions is not None:
            x = x + self._positions(batch.positions + model.position_offset)
        return x if self._embedding_norm is None else self._norm(x, self._embedding_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, local vocabulary]."""
        model, logits = self._model, self._head(hidden)
        if model.logit_scale != 1.0:
            logits = logits * model.logit_scale
        if model.final_softcap:
            logits = model.final_softcap * torch.tanh(logits / model.final_softcap)
        return logits
