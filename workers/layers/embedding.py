"""The vocabulary-parallel table, as input embedding and as output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.interface import KernelBackend, PackedLinear
from phalanx.protos.shards import Span
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.parallel import TensorParallel


class VocabTable:
    """This rank's vocabulary rows of one [vocabulary, hidden] table."""

    def __init__(
        self, name: str, vocab: Span, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.vocab = vocab
        self.weight = torch.empty(vocab.size, hidden, dtype=dtype, device=device)
        self.pieces = [Piece(name, self.weight, rows=vocab)]


class VocabParallelEmbedding:
    """Token ids -> hidden states; each rank looks up its own rows, the sum is the answer."""

    def __init__(self, table: VocabTable, group: TensorParallel) -> None:
        self._table, self._group = table, group

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> [T, hidden], equal on every rank."""
        table = self._table
        if self._group.size == 1:
            return F.embedding(token_ids, table.weight)
        local = token_ids - table.vocab.start
        foreign = (local < 0) | (local >= table.vocab.size)
        if table.vocab.size == 0:
            hidden = table.weight.new_zeros(len(token_ids), table.weight.shape[1])
        else:
            hidden = F.embedding(local.masked_fill(foreign, 0), table.weight)
            hidden.masked_fill_(foreign.unsqueeze(1), 0)
        return self._group.all_reduce(hidden)


class VocabParallelHead:
    """Hidden states -> logits of this rank's vocabulary rows; nothing is gathered."""

    def __init__(self, table: VocabTable) -> None:
        self._table = table
        self._run: PackedLinear | None = None

    def pack(self, backend: KernelBackend, *, shared: bool) -> None:
        """Prepare the product; a table shared with the embedding is used in place."""
        if shared:
            self._run = lambda x: F.linear(x, self._table.weight)
        else:
            self._run = backend.pack_linear(self._table.weight, None)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> logits [rows, local vocabulary]."""
        if self._run is None:
            raise RuntimeError("used before pack()")
        return self._run(hidden)
