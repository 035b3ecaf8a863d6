"""Penalties on the device, for sequences that have a seat there: which tokens each one holds.

Two tables [seats + 1, m] of this rank's slice of the vocabulary: whether a token stands in the prompt,
how often in the output. A step counts the token that it takes as input, so that nobody need know on
the host which one that is; prompts, and what was generated before or by another way, are written from
the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import Span
from phalanx.workers.transfer import upload

from .random import rows_at_once


class Penalties(NamedTuple):
    """What rows ask for, on the device, float64 [n] each."""

    repetition: Tensor
    presence: Tensor
    frequency: Tensor

    @staticmethod
    def numbers(params: SamplingParams) -> tuple[float, float, float]:
        """The three numbers of one row."""
        return params.repetition_penalty, params.presence_penalty, params.frequency_penalty


def is_penalised(params: SamplingParams) -> bool:
    """Whether logits depend on the tokens that came before."""
    return Penalties.numbers(params) != (1.0, 0.0, 0.0)


class TokenCounts:
    """The tables. The last seat is nobody's."""

    def __init__(self, seats: int, vocab: Span, device: torch.device) -> None:
        shape = (seats + 1, vocab.size)
        self._vocab, self._device = vocab, device
        self._prompt = torch.zeros(shape, dtype=torch.bool, device=device)
        self._output = torch.zeros(shape, dtype=torch.int32, device=device)

    def begin(self, seat: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Queue a seat's tables for a sequence."""
        self._prompt[seat].zero_()
        self._output[seat].zero_()
        columns = self._local(prompt)
        if len(columns):
            self._prompt[seat].index_fill_(0, upload(np.unique(columns), self._device), True)
        self.extend(seat, output)

    def extend(self, seat: int, output: Sequence[int]) -> None:
        """Queue more output of a sequence."""
        columns, counts = np.unique(self._local(output), return_counts=True)
        if len(columns):
            more = upload(counts.astype(np.int32), self._device)
            self._output[seat].index_add_(0, upload(columns, self._device), more)

    def _local(self, tokens: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        ids = np.asarray(tokens, dtype=np.int64)
        return ids[(ids >= self._vocab.start) & (ids < self._vocab.stop)] - self._vocab.start

    def count(self, seats: Tensor, tokens: Tensor, more: Tensor) -> None:
        """Add `more` int64 [n] to the output's tokens int64 [n] of seats int64 [n], of which only
        nobody's stands here twice, with nothing to add."""
        if not self._vocab.size:
            return
        columns = tokens - self._vocab.start
        inside = (columns >= 0) & (columns < self._vocab.size)
        cells = seats * self._vocab.size + columns.clamp(0, self._vocab.size - 1)
        flat = self._output.view(-1)
        flat.index_copy_(0, cells, flat.index_select(0, cells) + (more * inside).to(torch.int32))

    def penalised(self, logits: Tensor, seats: Tensor, penalties: Penalties) -> Tensor:
        """float32 logits [n, m] of rows in these seats, as `logits.adjust` would have them; may
        overwrite those given."""
        logits = logits.float()
        if not self._vocab.size:
            return logits
        step = rows_at_once(logits)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            repetition, presence, frequency = (column[rows, None] for column in penalties)
            counts = self._output.index_select(0, seats[rows])
            held = (counts > 0) | self._prompt.index_select(0, seats[rows])
            part, factor = logits[rows], repetition.to(torch.float32)
            part = torch.where(held, torch.where(part > 0, part / factor, part * factor), part)
            less = frequency * counts + presence
            logits[rows] = part - torch.where(counts > 0, less, 0.0).to(torch.float32)
        return logits
