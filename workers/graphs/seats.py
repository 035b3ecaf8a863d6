"""What the device remembers of running sequences, so that a step need not repeat it.

A sequence has a seat from its first recorded step to its end: a row of the block table, the start
of its random stream, temperature, filters and penalties. A step tells the device only what is new. The last seat is
nobody's: rows that pad a batch sit there, and write into a block that belongs to no sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from phalanx.protos.sampling import SamplingParams
from phalanx.workers.batch import SequenceState
from phalanx.workers.sampling.penalties import Penalties
from phalanx.workers.sampling.random import sample_key
from phalanx.workers.sampling.threshold import RowFilters
from phalanx.workers.transfer import upload

NUMBERS = 7
"""Of a seat: temperature, three filters, three penalties."""


class Seats:
    """Tables [seats + 1, ...] in device memory, changed in the order of the steps."""

    def __init__(
        self, count: int, width: int, spare_block: int, vocab_size: int, device: torch.device
    ) -> None:
        """width: blocks of a sequence at most; spare_block: the block of padding rows."""
        self._vocab_size = vocab_size
        self.spare = count
        """The seat of padding rows."""
        self.tables = torch.zeros(count + 1, width, dtype=torch.int32, device=device)
        self.tables[count] = spare_block
        self.keys = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(count + 1, NUMBERS, dtype=torch.float64, device=device)
        self.numbers[count] = torch.tensor(self._numbers(SamplingParams(temperature=0.0)))
        self._device = device
        self._free = list(range(count - 1, -1, -1))
        self._seats: dict[int, int] = {}
        self._written = [0] * count
        self._cells: list[int] = []
        self._blocks: list[int] = []
        self._new: list[tuple[int, int, tuple[float, ...]]] = []

    def has_room(self, states: Sequence[SequenceState]) -> bool:
        """Whether each of these has a seat or can get one."""
        width = self.tables.shape[1]
        missing = sum(state.seq not in self._seats for state in states)
        return missing <= len(self._free) and all(len(each.blocks) <= width for each in states)

    def take(self, state: SequenceState) -> int:
        """The sequence's seat, with its blocks as they are now; told to the device by `flush`."""
        seat = self._seats.get(state.seq)
        if seat is None:
            seat = self._seats[state.seq] = self._free.pop()
            self._written[seat] = 0
            key = sample_key(state.params.seed, state.sample_index)
            self._new.append((seat, key, self._numbers(state.params)))
        first, width = self._written[seat], self.tables.shape[1]
        self._cells += range(seat * width + first, seat * width + len(state.blocks))
        self._blocks += state.blocks[first:]
        self._written[seat] = len(state.blocks)
        return seat

    def _numbers(self, params: SamplingParams) -> tuple[float, ...]:
        return *RowFilters.numbers(params, self._vocab_size), *Penalties.numbers(params)

    def leave(self, seq: int) -> None:
        """The sequence is over; steps that were queued before this still find its row."""
        seat = self._seats.pop(seq, None)
        if seat is not None:
            self._free.append(seat)

    def flush(self) -> None:
        """Queue what has changed."""
        if self._new:
            seats, keys, numbers = (np.array(column) for column in zip(*self._new, strict=True))
            index = upload(seats.astype(np.int64), self._device)
            self.keys.index_copy_(0, index, upload(keys.astype(np.int64), self._device))
            self.numbers.index_copy_(0, index, upload(numbers.astype(np.float64), self._device))
            self._new = []
        if self._cells:
            cells = upload(np.array(self._cells, dtype=np.int64), self._device)
            blocks = upload(np.array(self._blocks, dtype=np.int32), self._device)
            self.tables.view(-1).index_copy_(0, cells, blocks)
            self._cells, self._blocks = [], []

    def rules(self, seats: Tensor) -> tuple[Tensor, RowFilters, Penalties]:
        """Keys [B] of int64 seats [B], and what they ask for."""
        numbers = self.numbers.index_select(0, seats).unbind(1)
        filters, penalties = RowFilters(*numbers[:4]), Penalties(*numbers[4:])
        return self.keys.index_select(0, seats), filters, penalties
