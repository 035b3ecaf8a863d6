"""Decode steps, recorded for every padded batch size and replayed.

A recorded step reads its inputs where they always stand: five numbers for each row, and the seats'
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
from numpy.typing import NDArray
from torch import Tensor

from phalanx.kernels.interface import CapturableBackend, KernelBackend
from phalanx.protos.recording import MAX_RECORDED_ROWS, RECORDED_LOGIT_ROWS, counts_tokens
from phalanx.protos.specs import WorkerSpec, activation_dtype
from phalanx.workers.batch import Batch, BatchBuilder, SequenceState
from phalanx.workers.sampling.logits import is_plain
from phalanx.workers.sampling.penalties import TokenCounts, is_penalised
from phalanx.workers.sampling.plain import PlainChoice
from phalanx.workers.sampling.rows import SampleRow, is_filtered, is_greedy
from phalanx.workers.transfer import Download, upload

from .device import Recorder, Work
from .seats import Seats

INPUTS = 5
"""Numbers of a row in a recorded step."""


class Tail(Enum):
    """How a recorded step ends."""

    GREEDY = "the likeliest tokens"
    DRAWN = "tokens by Gumbel-max"
    FILTERED = "of those that the filters leave"
    PENALISED = "after penalties for the tokens that came before"
    HIDDEN = "final hidden states, for a sampler that is not recorded"


def ending(rows: Sequence[SampleRow], vocab_size: int) -> Tail:
    """The shortest ending that gives all rows their tokens."""
    if not all(map(is_plain, rows)):
        return Tail.HIDDEN
    params = [row.params for row in rows]
    if any(map(is_penalised, params)):
        return Tail.PENALISED
    if all(map(is_greedy, params)):
        return Tail.GREEDY
    drawn = (each for each in params if not is_greedy(each))
    filtered = any(is_filtered(each, vocab_size) for each in drawn)
    return Tail.FILTERED if filtered else Tail.DRAWN


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
        counts: TokenCounts | None,
        *,
        most_rows: int,
        hidden: Tensor,
        block_size: int,
    ) -> None:
        """counts: None = no penalties here. hidden: [>= most_rows, hidden size], where
        `Tail.HIDDEN` leaves its rows."""
        self._model, self._backend, self._counts = model, backend, counts
        self._tails = [tail for tail in Tail if tail is not Tail.PENALISED or counts is not None]
        self._seats, self._block_size = seats, block_size
        self.sizes = batch_sizes(most_rows)
        largest, device = self.sizes[-1], hidden.device
        self._device, self._hidden = device, hidden
        self._inputs = torch.zeros(INPUTS, largest, dtype=torch.int64, device=device)
        self._outputs = torch.zeros(2, largest, dtype=torch.int64, device=device)
        self._rows = torch.arange(largest, device=device)
        self._replays: dict[tuple[int, Tail], Work] = {}
        self._last: dict[int, int] = {}
        """Rows of the tokens in `_outputs`, by sequence."""
        self._counted: dict[int, int] = {}
        """Tokens of a sequence that `counts` has, or has once the last step has run."""

    @classmethod
    def of(cls, spec: WorkerSpec, model: Model, backend: KernelBackend) -> StepGraphs | None:
        """For the engine of `spec`, whose model is one that `records_steps`, and whose pools have
        one block more than it says; None where the backend must know on the host what a step is
        about."""
        if not isinstance(backend, CapturableBackend):
            return None
        device, block_size = torch.device(spec.device), spec.cache.block_size
        width = min(-(-spec.model.max_context // block_size), spec.cache.num_blocks)
        most, vocab_size = spec.max_running, spec.model.vocab_size
        seats = Seats(most, width, spec.cache.num_blocks, vocab_size, device)
        counts = TokenCounts(most, model.choice.vocab, device) if counts_tokens(most) else None
        rows = min(spec.max_running, MAX_RECORDED_ROWS)
        dtype = getattr(torch, activation_dtype(spec.dtype))
        hidden = torch.zeros(rows, spec.model.hidden_size, dtype=dtype, device=device)
        return cls(
            model, backend, seats, counts, most_rows=rows, hidden=hidden, block_size=block_size
        )

    def record(self, recorder: Recorder) -> None:
        """Record every size and ending on padding rows, the largest first."""
        for size in reversed(self.sizes):
            for tail in self._tails:
                self._write([], tail)
                self._replays[size, tail] = recorder.record(partial(self._run, size, tail))

    def fits(self, states: Sequence[SequenceState]) -> bool:
        """Whether these have a place in a recorded step."""
        return len(states) <= self.sizes[-1] and self._seats.has_room(states)

    def offers(self, tail: Tail) -> bool:
        """Whether steps end so."""
        return tail in self._tails

    def feeds(self, state: SequenceState) -> bool:
        """Whether the sequence's newest token stands on the device."""
        return state.seq in self._last

    def forget(self, seq: int) -> None:
        """The sequence is over."""
        self._seats.leave(seq)
        self._counted.pop(seq, None)

    def choose(self, states: Sequence[SequenceState], tail: Tail) -> Chosen:
        """Queue a step that chooses a token for each of these, whose last token is its input.

        A last token that the host does not know must be one that the device does: see `feeds`.
        """
        self._replay(states, tail)
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

    def choose_from(self, hidden: Tensor, states: Sequence[SequenceState], tail: Tail) -> Chosen:
        """Queue the choice of a token for each of these, given final hidden states [rows, hidden]."""
        values = self._values(states, len(states), tail)
        self._seats.flush()
        known, sources, positions, seats, more = upload(values, self._device).unbind(0)
        self._end(hidden, self._tokens(known, sources), positions, seats, more, tail)
        return self._chosen(states)

    def _chosen(self, states: Sequence[SequenceState]) -> Chosen:
        self._last = {state.seq: row for row, state in enumerate(states)}
        return Chosen(Download(self._outputs[:, : len(states)]))

    def _replay(self, states: Sequence[SequenceState], tail: Tail) -> None:
        size = next(size for size in self.sizes if size >= len(states))
        self._write(states, tail)
        self._replays[size, tail]()

    def _write(self, states: Sequence[SequenceState], tail: Tail) -> None:
        """Queue the inputs; one copy, and the seats' changes where there are any."""
        values = self._values(states, self.sizes[-1], tail)
        self._seats.flush()
        self._inputs.copy_(upload(values, self._device), non_blocking=True)

    def _values(self, states: Sequence[SequenceState], size: int, tail: Tail) -> NDArray[np.int64]:
        """Of each row its token and, where only the device knows that, the row that chose it; its
        position and seat; how often the token is to be counted."""
        values = np.zeros((INPUTS, size), dtype=np.int64)
        values[1], values[3] = -1, self._seats.spare
        for row, state in enumerate(states):
            token = state.token_ids[-1]
            source = -1 if token >= 0 else self._last[state.seq]
            seat = self._seats.take(state)
            more = self._count(state, seat) if tail is Tail.PENALISED else 0
            values[:, row] = token, source, len(state.token_ids) - 1, seat, more
        return values

    def _count(self, state: SequenceState, seat: int) -> int:
        """See to it that all tokens but the last one are counted; how often that one is to be."""
        if self._counts is None or not is_penalised(state.params):
            return 0
        tokens, prompt = state.token_ids, state.num_prompt
        before, counted = len(tokens) - 1, self._counted.get(state.seq)
        if counted is None:
            self._counts.begin(seat, tokens[:prompt], tokens[prompt:before])
        elif counted < before:
            self._counts.extend(seat, tokens[counted:before])
        self._counted[state.seq] = len(tokens)
        return int(before >= prompt)

    def _tokens(self, known: Tensor, sources: Tensor) -> Tensor:
        fed = self._outputs[0].index_select(0, sources.clamp(min=0))
        return torch.where(sources >= 0, fed, known)

    def _run(self, size: int, tail: Tail) -> None:
        """What is recorded."""
        known, sources, positions, seats, more = self._inputs[:, :size].unbind(0)
        tokens = self._tokens(known, sources)
        tables = self._seats.tables.index_select(0, seats)
        block_size = self._block_size
        page = torch.div(positions, block_size, rounding_mode="floor")
        blocks = tables.gather(1, page[:, None])[:, 0].to(torch.int64)
        slots = blocks * block_size + positions % block_size
        plan = self._backend.plan_decode(tables, positions + 1, block_size)
        batch = self._model.builder.of_tensors(tokens, positions, slots, plan, self._rows[:size])
        hidden = self._model.layers(batch)
        if tail is Tail.HIDDEN:
            self._hidden[:size].copy_(hidden)
        else:
            self._end(hidden, tokens, positions, seats, more, tail)

    def _end(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        seats: Tensor,
        more: Tensor,
        tail: Tail,
    ) -> None:
        """Choose what follows `tokens`, which stand at `positions`, into the outputs."""
        if tail is Tail.PENALISED and self._counts is not None:
            self._counts.count(seats, tokens, more)
        for start in range(0, len(hidden), RECORDED_LOGIT_ROWS):
            rows = slice(start, min(start + RECORDED_LOGIT_ROWS, len(hidden)))
            logits = self._model.logits(hidden[rows])
            chosen, broken = self._choose(logits, seats[rows], positions[rows] + 1, tail)
            self._outputs[0, rows].copy_(chosen)
            self._outputs[1, rows].copy_(broken)

    def _choose(
        self, logits: Tensor, seats: Tensor, places: Tensor, tail: Tail
    ) -> tuple[Tensor, Tensor]:
        """Tokens that will stand at `places`, and which rows are broken."""
        choice = self._model.choice
        if tail is Tail.GREEDY:
            return choice.greedy(logits)
        keys, filters, penalties = self._seats.rules(seats)
        if tail is Tail.DRAWN:
            return choice.drawn(logits, filters.temperatures, keys, places)
        if tail is Tail.PENALISED and self._counts is not None:
            logits = self._counts.penalised(logits, seats, penalties)
        return choice.filtered(logits, filters, keys, places)
