"""Where the rows of a step find their states, and where they leave them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from phalanx.protos.errors import GroupLost
from phalanx.protos.steps import NO_STATE, Row, StateUse

PIECE_ELEMENTS = 1 << 21
"""Numbers of the states that advance together by one token, at least one row's."""


@dataclass(frozen=True, slots=True)
class StateRun:
    """A row of several tokens, [start, stop) of the batch; `saves` are (tokens, slot) within it."""

    start: int
    stop: int
    read: int
    write: int
    saves: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StateRows:
    """The rows of a step: those of one token, which advance together, and the `runs`.

    Of the former come last those that begin from zeros.
    """

    singles: Tensor  # int64 [S], where their tokens are in the batch
    read: Tensor  # int64 [S]
    write: Tensor  # int64 [S]
    num_begun: int
    """Of the singles, those that do not begin from zeros."""
    runs: list[StateRun]
    copies: tuple[Tensor, Tensor]
    """Slots whose states behind the rows' last tokens are kept, and where: int64, two alike."""

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> StateRows:
        """Raises `GroupLost` for a row that does not say where its states are."""
        singles: list[tuple[int, StateUse]] = []
        runs: list[StateRun] = []
        copies: list[tuple[int, int]] = []
        start = 0
        for row in rows:
            if (use := row.state) is None:
                raise GroupLost(f"plan does not say where the states of sequence {row.seq} are")
            if row.num_new == 1:
                singles.append((start, use))
            else:
                saves = tuple(
                    (s.num_tokens, s.slot) for s in use.saves if s.num_tokens < row.num_new
                )
                runs.append(StateRun(start, start + row.num_new, use.read, use.write, saves))
            copies += [(use.write, s.slot) for s in use.saves if s.num_tokens == row.num_new]
            start += row.num_new
        singles.sort(key=lambda single: single[1].read == NO_STATE)  # stable

        def tensor(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        return cls(
            singles=tensor(first for first, _ in singles),
            read=tensor(max(use.read, 0) for _, use in singles),
            write=tensor(use.write for _, use in singles),
            num_begun=sum(use.read != NO_STATE for _, use in singles),
            runs=runs,
            copies=(tensor(old for old, _ in copies), tensor(new for _, new in copies)),
        )


class Carried:
    """The states of a step's rows in one pool, [slots, ...]."""

    def __init__(self, rows: StateRows, pool: Tensor) -> None:
        self._rows, self._pool = rows, pool

    def pieces(self) -> Iterator[slice]:
        """Runs of the rows of one token, so long that their states are not too many at a time."""
        count = len(self._rows.singles)
        step = max(PIECE_ELEMENTS // max(self._pool[0].numel(), 1), 1)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def load(self, piece: slice) -> Tensor:
        """A copy of the states of such rows, [rows, ...]."""
        states = self._pool[self._rows.read[piece]]
        if (fresh := self._rows.num_begun) < piece.stop:
            states[max(fresh - piece.start, 0) :] = 0
        return states

    def store(self, piece: slice, states: Tensor) -> None:
        """Leave such rows' states behind their tokens."""
        self._pool[self._rows.write[piece]] = states

    def begin(self, run: StateRun) -> Tensor:
        """What a run begins from; not to be changed."""
        if run.read == NO_STATE:
            return torch.zeros_like(self._pool[0])
        return self._pool[run.read]

    def keep(self, slot: int, state: Tensor) -> None:
        """Leave a run's state in a slot."""
        self._pool[slot] = state

    def finish(self) -> None:
        """Once all rows are done: what is kept beside their own states."""
        old, new = self._rows.copies
        if len(old):
            self._pool[new] = self._pool[old]


def check_states(rows: Sequence[Row], num_states: int) -> None:
    """Raise `GroupLost` for slots that are not there, or that one row writes and another uses."""
    written: set[int] = set()
    begun: set[int] = set()
    for row in rows:
        use = row.state
        if use is None:
            continue
        slots = [use.write, *(save.slot for save in use.saves)]
        for slot in (max(use.read, 0), *slots):
            if not 0 <= slot < num_states:
                raise GroupLost(f"plan names state {slot}, there are {num_states}")
        if len({*slots} | written) < len(slots) + len(written):
            raise GroupLost(f"plan writes a state of {slots} twice")
        written.update(slots)
        if use.read not in (NO_STATE, use.write):
            begun.add(use.read)
        places = [0, *(save.num_tokens for save in use.saves), row.num_new + 1]
        if any(later <= place for place, later in pairwise(places)):
            raise GroupLost(f"plan saves states of sequence {row.seq} behind tokens {places[1:-1]}")
    if both := begun & written:
        raise GroupLost(f"plan begins from states {sorted(both)} and writes them")
