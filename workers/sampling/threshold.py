"""Top-k, top-p and min-p without sorting and without the host: which logits stay, by a threshold.

Tokens are ordered as everywhere, higher logits first, equal ones by lower id. What the filters keep
are the first of that order, so they are found by the last one's logit, and by how many of those
equal to it are kept. A logit is an integer in disguise (`order_keys`), and the number or the weight
of the logits above a threshold falls with it: so it is found sixteen at a time, four bits a round.
Each round, ranks exchange sixteen numbers a row. Tokens are those of `candidates.kept`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.interface import SamplingBackend
from phalanx.protos.sampling import SamplingParams
from phalanx.workers.parallel import TensorParallel

from .candidates import PROBABILITY_SLACK
from .random import rows_at_once
from .rows import is_greedy

KEY_BITS, DIGIT_BITS = 32, 4
DIGITS = 1 << DIGIT_BITS
LEFT_OUT = -3e38
"""In place of logits that are left out: finite, as those of a row that can be sampled are."""

LEAST_GOAL = 1e-300
"""The best token is always kept."""

Measure = Callable[[Tensor, int], Tensor]
"""(lowest thresholds int64 [n], distance of the next) -> of all ranks, float64 [n, DIGITS]."""


class RowFilters(NamedTuple):
    """What rows ask for, on the device, [n] each."""

    temperatures: Tensor
    """float64; 0 = greedy."""
    top_k: Tensor
    """float64; infinite = all."""
    top_p: Tensor
    min_p: Tensor

    @staticmethod
    def numbers(params: SamplingParams, vocab_size: int) -> tuple[float, float, float, float]:
        """The four numbers of one row."""
        greedy = is_greedy(params)
        limited = 0 < params.top_k < vocab_size
        return (
            0.0 if greedy else params.temperature,
            float(params.top_k) if limited else math.inf,
            params.top_p,
            params.min_p,
        )


def order_keys(logits: Tensor) -> Tensor:
    """int64 in [0, 2**32) of float32 logits: greater for greater ones, equal for equal ones."""
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + (1 << 31)


def logit_of(keys: Tensor) -> Tensor:
    """The float32 that a key stands for."""
    bits = (keys - (1 << 31)).to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def tail_sums(
    logits: Tensor, tops: Tensor, warmth: Tensor, lowest: Tensor, step: int, *, weighted: bool
) -> Tensor:
    """See `SamplingBackend.tail_sums`."""
    keys = order_keys(logits)
    weights = torch.ones_like(logits, dtype=torch.float64)
    if weighted:
        weights = ((logits.double() - tops[:, None]) / warmth[:, None]).exp()
    sums = [
        torch.where(keys >= (lowest + digit * step)[:, None], weights, 0.0).sum(1)
        for digit in range(DIGITS)
    ]
    return torch.stack(sums, dim=1)


class Thresholds:
    """Applies the filters of rows to one rank's slice of their logits."""

    def __init__(self, group: TensorParallel, backend: SamplingBackend | None) -> None:
        self._group = group
        self._sums = tail_sums if backend is None else backend.tail_sums

    def apply(self, logits: Tensor, filters: RowFilters) -> Tensor:
        """float32 logits [n, m], those that are left out at `LEFT_OUT`; may overwrite those given."""
        logits = logits.float()
        step = rows_at_once(logits)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            left = self._apply(logits[rows], RowFilters(*(field[rows] for field in filters)))
            logits[rows] = left
        return logits

    def _apply(self, logits: Tensor, filters: RowFilters) -> Tensor:
        tops = self._tops(logits)
        warmth = torch.where(filters.temperatures > 0, filters.temperatures, 1.0)

        def measure(lowest: Tensor, step: int, *, weighted: bool) -> Tensor:
            if not logits.shape[1]:
                sums = tops.new_zeros(len(logits), DIGITS)
            else:
                sums = self._sums(logits, tops, warmth, lowest, step, weighted=weighted)
            return self._total(sums)

        def count(lowest: Tensor, step: int) -> Tensor:
            return measure(lowest, step, weighted=False)

        def mass(lowest: Tensor, step: int) -> Tensor:
            return measure(lowest, step, weighted=True)

        def weight(key: Tensor) -> Tensor:
            return ((logit_of(key).double() - tops) / warmth).exp()

        infinite = torch.full_like(tops, math.inf)
        by_k = _last_above(count, filters.top_k)
        spare_k = filters.top_k - count(by_k, 1)[:, 1]
        limited = filters.top_k < math.inf
        whole = mass(torch.zeros_like(by_k), 1)[:, 0]
        total = torch.where(limited, mass(by_k, 1)[:, 1] + spare_k * weight(by_k), whole)
        goal = (filters.top_p * total * (1.0 - PROBABILITY_SLACK)).clamp(min=LEAST_GOAL)
        by_p = _last_above(mass, torch.where(filters.top_p < 1.0, goal, infinite))
        spare_p = ((goal - mass(by_p, 1)[:, 1]) / weight(by_p)).ceil().clamp(min=1.0)
        spare_p = torch.where(filters.top_p < 1.0, spare_p, infinite)
        by_min = _least_key(tops + warmth * filters.min_p.log())
        last = torch.maximum(torch.maximum(by_k, by_p), by_min)
        spare = torch.minimum(
            torch.where(by_k == last, spare_k, infinite),
            torch.where(by_p == last, spare_p, infinite),
        )
        return self._without(logits, last, spare)

    def _without(self, logits: Tensor, last: Tensor, spare: Tensor) -> Tensor:
        """Leave out what comes after the first `spare` logits of key `last`."""
        keys = order_keys(logits)
        tied = keys == last[:, None]
        before = torch.zeros_like(spare)
        if self._group.size > 1:  # lower ranks hold lower ids
            ties = self._group.all_gather(tied.sum(1).double())
            before = ties[: self._group.rank].sum(0)
        place = tied.cumsum(1, dtype=torch.int32)
        kept = (keys > last[:, None]) | (tied & (place <= (spare - before)[:, None]))
        return torch.where(kept | ~logits.isfinite(), logits, LEFT_OUT)

    def _tops(self, logits: Tensor) -> Tensor:
        """The rows' largest logits, float64."""
        shape = (len(logits), 1)
        low = logits.new_full(shape, -math.inf)
        tops = torch.cat([logits, low], dim=1).amax(1) if not logits.shape[1] else logits.amax(1)
        if self._group.size > 1:
            tops = self._group.all_gather(tops.double()).amax(0)
        return tops.double()

    def _total(self, sums: Tensor) -> Tensor:
        return self._group.all_gather(sums).sum(0) if self._group.size > 1 else sums


def _last_above(measure: Measure, goals: Tensor) -> Tensor:
    """The highest key down to which the measure reaches its goal; 0 where it does not."""
    keys = torch.zeros_like(goals, dtype=torch.int64)
    for shift in range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
        reached = measure(keys, 1 << shift)[:, 1:] >= goals[:, None]
        keys = keys + (reached.sum(1) << shift)
    return keys


def _least_key(floors: Tensor) -> Tensor:
    """Key of the least float32 that is not below a float64 floor."""
    near = floors.to(torch.float32)
    up = near.nextafter(near.new_full((), math.inf))
    return order_keys(torch.where(near.double() < floors, up, near))
