"""Rows with top-k, top-p or min-p: rounds of candidate lists until the filters are decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phalanx.workers.parallel import TensorParallel

from .candidates import (
    Filters,
    Merged,
    draw,
    kept,
    local_candidates,
    local_mass,
    merge,
    total_mass,
)
from .exchange import exchange
from .rows import Chosen, SampleRow, select_rows, stream_keys

FIRST_COUNT, MOST_FIRST_COUNT = 64, 512  # candidates of each rank in the first round
MOST_CANDIDATES = 1 << 15  # of each rank and all rows, gathered at a time in later rounds
MOST_SELECTED = 1 << 19  # logits that are copied at a time to look at some of the rows
GROWTH = 8  # candidates of the next round over those of this one
NAMES = ("candidate values", "candidate ids", "candidate raw")


class FilteredRows:
    """The filtered rows of one batch. The first round travels with the batch's own collective."""

    def __init__(
        self,
        logits: Tensor,
        raw: Tensor,
        rows: Sequence[SampleRow],
        indices: Sequence[int],
        first_id: int,
        vocab_size: int,
    ) -> None:
        """logits, raw: the whole batch's slices [n, m]; `indices`: the filtered rows of it."""
        self._logits, self._raw, self._first_id = logits, raw, first_id
        self._indices = torch.tensor(indices, dtype=torch.int64)
        mine = [rows[index] for index in indices]
        self._filters = Filters.of([row.params for row in mine], vocab_size)
        self._keys = stream_keys(mine)
        wanted = max((row.params.top_k for row in mine), default=0)
        self._count = min(max(FIRST_COUNT, wanted), MOST_FIRST_COUNT, vocab_size + 1)
        summed = ~self._filters.limited & (self._filters.top_p < 1.0)
        self._summed = summed.nonzero()[:, 0]
        """Slots whose top-p needs the sum over the whole vocabulary."""

    def first_parts(self) -> dict[str, Tensor]:
        """This rank's part of the first round; empty without filtered rows."""
        if not len(self._indices):
            return {}
        parts = self._candidates(self._indices)
        if len(self._summed):
            temperatures = self._filters.temperature[self._summed].to(self._logits.device)
            part = select_rows(self._logits, self._indices[self._summed].tolist())
            parts["mass"] = local_mass(part, temperatures)
        return parts

    def decide(
        self, group: TensorParallel, gathered: Mapping[str, Tensor], failed: Tensor, chosen: Chosen
    ) -> None:
        """Write the tokens of all filtered rows, but the failed ones, into `chosen`."""
        if not len(self._indices):
            return
        total = torch.ones(len(self._indices), dtype=torch.float64)
        if len(self._summed):
            temperatures = self._filters.temperature[self._summed]
            total[self._summed] = total_mass(gathered["mass"], temperatures)[1]
        longest = int(gathered["slice"].max()) + 1  # one more shows that a slice has ended
        pending = torch.arange(len(self._indices))
        merged = merge([gathered[name] for name in NAMES])
        pending, merged = _without(pending, merged, failed[self._indices])
        pending = self._settle(merged, pending, total, chosen)
        while len(pending):
            self._count = min(self._count * GROWTH, longest)
            undecided = []
            for slots in torch.split(pending, max(1, MOST_CANDIDATES // self._count)):
                more = exchange(group, self._candidates(self._indices[slots]))
                merged = merge([more[name] for name in NAMES])
                undecided.append(self._settle(merged, slots, total, chosen))
            pending = torch.cat(undecided)

    def _settle(self, merged: Merged, slots: Tensor, total: Tensor, chosen: Chosen) -> Tensor:
        """Choose for those of the rows `slots` whose filters are decided; the others."""
        cut = kept(merged, self._filters.select(slots), total[slots])
        self._choose(merged, slots, cut, chosen)
        return slots[cut == 0]

    def _candidates(self, rows: Tensor) -> dict[str, Tensor]:
        height, width = self._logits.shape
        step = height if len(rows) == height else max(1, MOST_SELECTED // width)
        lists = []
        for part in torch.split(rows, step):
            chosen = part.tolist()
            logits, raw = select_rows(self._logits, chosen), select_rows(self._raw, chosen)
            lists.append(local_candidates(logits, raw, self._first_id, self._count))
        return {name: torch.cat(fields) for name, *fields in zip(NAMES, *lists, strict=True)}

    def _choose(self, merged: Merged, slots: Tensor, cut: Tensor, chosen: Chosen) -> None:
        """Draw for those of the rows `slots` whose filters are decided."""
        ready, slots, cut = merged.select(cut > 0), slots[cut > 0], cut[cut > 0]
        if not len(slots):
            return
        place = draw(ready.tokens, cut, self._filters.select(slots), self._keys[slots])[:, None]
        values, ids, raw = (field.gather(1, place)[:, 0] for field in ready.tokens)
        chosen.put(self._indices[slots], ids, values, raw)


def _without(slots: Tensor, merged: Merged, failed: Tensor) -> tuple[Tensor, Merged]:
    """The rows that have not failed."""
    if not bool(failed.any()):
        return slots, merged
    return slots[~failed], merged.select(~failed)
