"""The next tokens of rows without log-probabilities, all on the device.

The host reads nothing on the way, so that this can be recorded and replayed with the layers. The
tokens are those of `Sampler`: the same maximum of the same float64 numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend, SamplingBackend
from phalanx.protos.shards import Span
from phalanx.workers.parallel import TensorParallel

from .candidates import NO_TOKEN
from .random import gumbel, mixed, rows_at_once, token_bits
from .threshold import RowFilters, Thresholds


class PlainChoice:
    """Greedy tokens, or tokens by Gumbel-max; every rank gets the same ones."""

    def __init__(self, group: TensorParallel, vocab: Span, backend: KernelBackend) -> None:
        self._group, self._vocab = group, vocab
        self._first_id = vocab.start if vocab.size else NO_TOKEN
        self._backend = backend if isinstance(backend, SamplingBackend) else None
        self._thresholds = Thresholds(group, self._backend)

    @property
    def vocab(self) -> Span:
        """This rank's slice of the vocabulary."""
        return self._vocab

    def greedy(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [n], and bool [n]: the row's logits are broken, its token is 0.

        logits: this rank's slice [n, vocab.size], any floating type; may be overwritten.
        """
        if self._backend is not None and self._vocab.size:
            zeros = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            return self._sampled(self._backend, logits, zeros.double(), zeros, zeros)
        logits, broken = self._prepared(logits)
        columns = logits.argmax(-1)
        return self._agreed(logits.gather(1, columns[:, None])[:, 0].double(), columns, broken)

    def drawn(
        self, logits: Tensor, temperatures: Tensor, keys: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `greedy`; float64 temperatures [n], of which 0 is greedy.

        keys: int64 [n], the rows' `sample_key`s; positions: int64 [n], where the tokens will
        stand.
        """
        if self._backend is not None and self._vocab.size:
            return self._sampled(self._backend, logits, temperatures, keys, positions)
        logits, broken = self._prepared(logits)
        best, columns = gumbel_max(logits, temperatures, mixed(keys, positions), self._first_id)
        return self._agreed(best, columns, broken)

    def filtered(
        self, logits: Tensor, filters: RowFilters, keys: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `drawn`, of the tokens that the rows' filters leave."""
        left = self._thresholds.apply(logits, filters)
        return self.drawn(left, filters.temperatures, keys, positions)

    def _sampled(
        self,
        backend: SamplingBackend,
        logits: Tensor,
        temperatures: Tensor,
        keys: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        winners = backend.sample(logits, temperatures, keys, positions, self._first_id)
        if self._group.size > 1:
            winners = backend.merge_winners(self._group.all_gather(winners))
        broken = winners[:, 3] > 0
        return winners[:, 0].to(torch.int64).masked_fill(broken, 0), broken

    def _prepared(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As `Sampler`: broken rows become zeros; a rank without vocabulary cannot win."""
        logits = logits.float()
        if not self._vocab.size:
            nothing = logits.new_full((logits.shape[0], 1), -math.inf)
            return nothing, logits.new_zeros(logits.shape[0], dtype=torch.bool)
        low, high = logits.aminmax(dim=-1)
        broken = ~(low.isfinite() & high.isfinite())
        return logits.masked_fill_(broken[:, None], 0.0), broken

    def _agreed(self, best: Tensor, columns: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
        ids = columns + self._first_id
        if self._group.size == 1:
            return ids.masked_fill(broken, 0), broken
        # ids pass through float64 unchanged; the raw logit is not asked for
        mine = torch.stack([ids.double(), best, best, broken.double()], dim=1)
        tokens, values, _, failed = self._group.all_gather(mine).unbind(2)
        tied = values == values.amax(0)
        lowest = torch.where(tied, tokens, float(NO_TOKEN)).amin(0).to(torch.int64)
        any_broken = failed.amax(0) > 0
        return lowest.masked_fill(any_broken, 0), any_broken


def gumbel_max(
    logits: Tensor, temperatures: Tensor, keys: Tensor, first_id: int
) -> tuple[Tensor, Tensor]:
    """Best logit + temperature * noise of each row, float64 [n], and its first column, int64 [n].

    logits: float32 [n, m] of the tokens from `first_id` on; temperatures: float64 [n];
    keys: int64 [n].
    """
    count, width = logits.shape
    ids = torch.arange(first_id, first_id + width, device=logits.device)
    parts = []
    step = rows_at_once(logits)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        noise = gumbel(token_bits(keys[rows, None], ids)).mul_(temperatures[rows, None])
        parts.append(noise.add_(logits[rows]).max(-1))
    best, columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return best, columns
