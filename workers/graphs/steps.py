"""Decode steps, recorded for every padded batch size and replayed.

A recorded step reads its inputs where they always stand: four numbers for each row, and the seats'
tables. It takes a row's input token from what the step before it has chosen, where the host does
not know that token yet; so step n + 1 can be queued while step n still runs, and the host reads
the tokens of step n afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phalanx.kernels.interface import CapturableBackend, KernelBackend
from phalanx.protos.recording import MAX_RECORDED_ROWS, RECORDED_LOGIT_ROWS
from phalanx.protos.specs import WorkerSpec, activation_dtype
from phalanx.workers.batch import Batch, BatchBuilder, SequenceState
from phalanx.workers.sampling.plain import PlainChoice
from phalanx.workers.transfer import Download, upload

from .device import Recorder, Work
from .seats import Seats


class Tail(Enum):
    """How a recorded step ends."""

    GREEDY = "the likeliest tokens"
    DRAWN = "tokens by Gumbel-max"
    HIDDEN = "final hidden states, for a sampler that is not recorded"


class Model(NamedTuple):
    """What a step computes with."""

    builder: BatchBuilder
    layers: Callable[[Batch], Tensor]
    """Final hidden states of the rows that need logits, [rows, hidden]."""
    logits: Callable[[Tensor], Tensor]
    """hidden [rows, hidden] -> [rows, local vocabulary]."""
    choice: PlainChoice


def batch_sizes(most: int) -> list[int]:
    """Sizes to record for up to `most` rows: no step is padded by more than an eighth, and 7."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MAX_RECORDED_ROWS + 1, 32)]
    most = min(most, MAX_RECORDED_ROWS)
    return [size for size in sizes if size < most] + [most]


class Chosen(NamedTuple):
    """The tokens of a step, on their way to the host."""

    download: Download

    def get(self) -> tuple[list[int], list[bool]]:
        """Of each row, its token and whether its logits were broken; waits for the device."""
        tokens, broken = self.download.get()
        return tokens.tolist(), (broken != 0).tolist()


class StepGraphs:
    """Recorded steps of one rank. Every rank of a group records and replays the same ones."""

    def __init__(
        self,
        model: Model,
        backend: CapturableBackend,
        seats: Seats,
        *,
        most_rows: int,
        hidden: Tensor,
        block_size: int,
    ) -> None:
        """hidden: [>= most_rows, hidden size], where `Tail.HIDDEN` leaves its rows."""
        self._model, self._backend = model, backend
        self._seats, self._block_size = seats, block_size
        self.sizes = batch_sizes(most_rows)
        largest, device = self.sizes[-1], hidden.device
        self._device, self._hidden = device, hidden
        self._inputs = torch.zeros(4, largest, dtype=torch.int64, device=device)
        self._outputs = torch.zeros(2, largest, dtype=torch.int64, device=device)
        self._rows = torch.arange(largest, device=device)
        self._replays: dict[tuple[int, Tail], Work] = {}
        self._last: dict[int, int] = {}
        """Rows of the tokens in `_outputs`, by sequence."""

    @classmethod
    def of(cls, spec: WorkerSpec, model: Model, backend: KernelBackend) -> StepGraphs | None:
        """For the engine of `spec`, whose model is one that `records_steps`, and whose pools have
        one block more than it says; None where the backend must know on the host what a step is
        about."""
        if not isinstance(backend, CapturableBackend):
            return None
        device, block_size = torch.device(spec.device), spec.cache.block_size
        width = min(-(-spec.model.max_context // block_size), spec.cache.num_blocks)
        seats = Seats(spec.max_running, width, spec.cache.num_blocks, device)
        rows = min(spec.max_running, MAX_RECORDED_ROWS)
        dtype = getattr(torch, activation_dtype(spec.dtype))
        hidden = torch.zeros(rows, spec.model.hidden_size, dtype=dtype, device=device)
        return cls(model, backend, seats, most_rows=rows, hidden=hidden, block_size=block_size)

    def record(self, recorder: Recorder) -> None:
        """Record every size and ending on padding rows, the largest first."""
        for size in reversed(self.sizes):
            for tail in Tail:
                self._write([], size)
                self._replays[size, tail] = recorder.record(partial(self._run, size, tail))

    def fits(self, states: Sequence[SequenceState]) -> bool:
        """Whether tokens for these can be chosen on the device."""
        return len(states) <= self.sizes[-1] and self._seats.has_room(states)

    def feeds(self, state: SequenceState) -> bool:
        """Whether the sequence's newest token stands on the device."""
        return state.seq in self._last

    def forget(self, seq: int) -> None:
        """The sequence is over."""
        self._seats.leave(seq)

    def choose(self, states: Sequence[SequenceState], *, greedy: bool) -> Chosen:
        """Queue a step that chooses a token for each of these, whose last token is its input.

        A last token that the host does not know must be one that the device does: see `feeds`.
        """
        self._replay(states, _tail(greedy))
        return self._chosen(states)

    def compute(self, states: Sequence[SequenceState]) -> Tensor:
        """Queue the step's layers: final hidden states [rows, hidden], until the next step."""
        self._replay(states, Tail.HIDDEN)
        return self._hidden[: len(states)]

    def feed(self, token_ids: Tensor, fed: Sequence[tuple[int, SequenceState]]) -> None:
        """Write the tokens that only the device knows into a batch: (row, sequence) of each."""
        if not fed:
            return
        places = [(row, self._last[state.seq]) for row, state in fed]
        rows, sources = upload(np.array(places, dtype=np.int64).T.copy(), self._device)
        token_ids.index_copy_(0, rows, self._outputs[0].index_select(0, sources))

    def choose_from(
        self, hidden: Tensor, states: Sequence[SequenceState], *, greedy: bool
    ) -> Chosen:
        """Queue the choice of the states' next tokens after a step that was not recorded.

        hidden: their final hidden states, [len(states), hidden].
        """
        if not states:
            return self._chosen(states)
        places = [(self._seats.take(state), len(state.token_ids)) for state in states]
        self._seats.flush()
        seats, lengths = upload(np.array(places, dtype=np.int64).T.copy(), self._device)
        _, keys, temperatures = self._seats.rows(seats)
        self._choose(hidden, temperatures, keys, lengths, _tail(greedy))
        return self._chosen(states)

    def _chosen(self, states: Sequence[SequenceState]) -> Chosen:
        self._last = {state.seq: row for row, state in enumerate(states)}
        return Chosen(Download(self._outputs[:, : len(states)]))

    def _replay(self, states: Sequence[SequenceState], tail: Tail) -> None:
        size = next(size for size in self.sizes if size >= len(states))
        self._write(states, size)
        self._replays[size, tail]()

    def _write(self, states: Sequence[SequenceState], size: int) -> None:
        """Queue the inputs; one copy, and the seats' changes where there are any."""
        values = np.zeros((4, self.sizes[-1]), dtype=np.int64)
        values[1], values[3] = -1, self._seats.spare
        for row, state in enumerate(states):
            token = state.token_ids[-1]
            source = -1 if token >= 0 else self._last[state.seq]
            values[:, row] = token, source, state.num_computed - 1, self._seats.take(state)
        self._seats.flush()
        self._inputs.copy_(upload(values, self._device), non_blocking=True)

    def _run(self, size: int, tail: Tail) -> None:
        """What is recorded."""
        known, sources, positions, seats = self._inputs[:, :size].unbind(0)
        fed = self._outputs[0].index_select(0, sources.clamp(min=0))
        tokens = torch.where(sources >= 0, fed, known)
        tables, keys, temperatures = self._seats.rows(seats)
        block_size = self._block_size
        page = torch.div(positions, block_size, rounding_mode="floor")
        blocks = tables.gather(1, page[:, None])[:, 0].to(torch.int64)
        slots = blocks * block_size + positions % block_size
        lengths = positions + 1
        plan = self._backend.plan_decode(tables, lengths, block_size)
        batch = self._model.builder.of_tensors(tokens, positions, slots, plan, self._rows[:size])
        hidden = self._model.layers(batch)
        if tail is Tail.HIDDEN:
            self._hidden[:size].copy_(hidden)
        else:
            self._choose(hidden, temperatures, keys, lengths, tail)

    def _choose(
        self, hidden: Tensor, temperatures: Tensor, keys: Tensor, places: Tensor, tail: Tail
    ) -> None:
        """Choose the tokens that will stand at `places`, into the outputs."""
        choice = self._model.choice
        for start in range(0, len(hidden), RECORDED_LOGIT_ROWS):
            rows = slice(start, min(start + RECORDED_LOGIT_ROWS, len(hidden)))
            logits = self._model.logits(hidden[rows])
            if tail is Tail.GREEDY:
                chosen, broken = choice.greedy(logits)
            else:
                chosen, broken = choice.drawn(logits, temperatures[rows], keys[rows], places[rows])
            self._outputs[0, rows].copy_(chosen)
            self._outputs[1, rows].copy_(broken)


def _tail(greedy: bool) -> Tail:
    return Tail.GREEDY if greedy else Tail.DRAWN
