"""The vocabulary-parallel table, as input embedding and as output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.fused import BestOutput, RowLookup
from phalanx.kernels.interface import PackedLinear, WideLinear
from phalanx.protos.shards import Span
from phalanx.workers.loading.memory import room
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.packing import Int8Packer, LinearPacker
from phalanx.workers.parallel import TensorParallel


class VocabTable:
    """This rank's vocabulary rows of one [vocabulary, hidden] table, and of a head's bias."""

    def __init__(
        self,
        name: str,
        vocab: Span,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        bias: str | None = None,
    ) -> None:
        self.vocab = vocab
        self._rows: RowLookup | None = None
        self.weight = room((vocab.size, hidden), dtype, device)
        self.pieces = [Piece(name, self.weight, rows=vocab)]
        self.bias: Tensor | None = None
        if bias is not None:
            self.bias = torch.empty(vocab.size, dtype=dtype, device=device)
            self.pieces.append(Piece(bias, self.bias, rows=vocab))

    def release(self, rows: RowLookup | None = None) -> None:
        """Forget the weight, once it is held in another layout, of which `rows` reads rows."""
        self.weight, self.pieces = self.weight[:0].clone(), []
        self._rows = rows

    def filled(self) -> None:
        """The weight is there already."""
        self.pieces = []

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the table for local ids, int64 [T] -> [T, hidden]."""
        return F.embedding(ids, self.weight) if self._rows is None else self._rows.rows(ids)


class VocabParallelEmbedding:
    """Token ids -> hidden states; each rank looks up its own rows, the sum is the answer."""

    def __init__(self, table: VocabTable, group: TensorParallel) -> None:
        self._table, self._group = table, group

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> [T, hidden], equal on every rank."""
        table = self._table
        if self._group.size == 1:
            return table.lookup(token_ids)
        local = token_ids - table.vocab.start
        foreign = (local < 0) | (local >= table.vocab.size)
        if table.vocab.size == 0:
            hidden = table.weight.new_zeros(len(token_ids), table.weight.shape[1])
        else:
            hidden = table.lookup(local.masked_fill(foreign, 0))
            hidden.masked_fill_(foreign.unsqueeze(1), 0)
        return self._group.all_reduce(hidden)


class PositionTable:
    """Learned absolute positions, whole on every rank: row `position + offset`."""

    def __init__(
        self, name: str, rows: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.weight = torch.empty(rows, hidden, dtype=dtype, device=device)
        self.pieces = [Piece(name, self.weight)]

    def __call__(self, rows: Tensor) -> Tensor:
        """rows int64 [T] -> [T, hidden]."""
        return F.embedding(rows, self.weight)


class VocabParallelHead:
    """Hidden states -> logits of this rank's vocabulary rows; nothing is gathered."""

    def __init__(self, table: VocabTable, *, shared: bool) -> None:
        """shared: the table is the embedding as well."""
        self._table, self._shared = table, shared
        self._packed: PackedLinear | None = None
        self._run: PackedLinear | None = None
        self._best: BestOutput | None = None

    @property
    def pieces(self) -> list[Piece]:
        """Those of the table."""
        return self._table.pieces

    @property
    def packed(self) -> PackedLinear:
        """The backend's product."""
        if self._packed is None:
            raise RuntimeError("used before pack(), or the table is used as it is")
        return self._packed

    def pack(self, backend: LinearPacker) -> None:
        """Prepare the product; a table shared with the embedding is used in place, or, where the
        head is rounded, kept beside it."""
        if self._run is None:
            table, rounded = self._table, isinstance(backend, Int8Packer)
            self.adopt(backend.pack_linear(table.weight, table.bias), rounded=rounded)

    def adopt(self, packed: PackedLinear, *, rounded: bool = True) -> None:
        """Take what the table was packed to. rounded: the table's own weight is no substitute."""
        table, self._packed = self._table, packed
        # two tokens whose bfloat16 logits tie are seldom equal: the sums are taken unrounded
        run = packed.wide if isinstance(packed, WideLinear) else packed
        if isinstance(packed, BestOutput):
            self._best = packed
        if not self._shared:
            self._run = run
            table.release()
        elif isinstance(packed, RowLookup):
            self._run = run
            table.release(packed)
        elif rounded:
            self._run = run
        else:
            self._packed, self._run = None, lambda x: F.linear(x, table.weight, table.bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> logits [rows, local vocabulary], float32 where it is free."""
        if self._run is None:
            raise RuntimeError("used before pack()")
        return self._run(hidden)

    @property
    def finds_best(self) -> bool:
        """Whether `best` works."""
        return self._best is not None

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `BestOutput`: the local column of the largest logit, and the logit."""
        if self._best is None:
            raise RuntimeError("the backend does not find the largest output by itself")
        return self._best.best(hidden)
