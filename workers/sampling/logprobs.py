"""Log-probabilities under the model's own distribution: before penalties and temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from phalanx.protos.steps import TokenLogprob

from .candidates import local_candidates, local_mass, merge, total_mass
from .random import rows_at_once


def local_parts(raw: Tensor, first_id: int, count: int) -> dict[str, Tensor]:
    """What one rank tells of its slice [n, m]: its `count` best tokens, and its denominators."""
    best = local_candidates(raw, raw, first_id, count)
    ones = torch.ones(raw.shape[0], dtype=torch.float64, device=raw.device)
    return {
        "top values": best.values,
        "top ids": best.token_ids,
        "raw mass": local_mass(raw, ones, torch.float32),
    }


def better_tokens(raw: Tensor, first_id: int, values: Tensor, token_ids: Tensor) -> Tensor:
    """How many tokens of the slice [n, m] stand before (value, token id) of each row: int64 [n]."""
    values, token_ids = values.to(raw), token_ids.to(raw.device)
    ids = torch.arange(first_id, first_id + raw.shape[1], device=raw.device)
    counts = torch.empty(raw.shape[0], dtype=torch.int64, device=raw.device)
    step = rows_at_once(raw)
    for start in range(0, raw.shape[0], step):
        part = slice(start, start + step)
        value, token_id = values[part, None], token_ids[part, None]
        before = (raw[part] > value) | ((raw[part] == value) & (ids < token_id))
        counts[part] = before.sum(-1)
    return counts


class Distribution:
    """The head of n rows' distributions over the whole vocabulary, in host memory."""

    def __init__(self, gathered: Mapping[str, Tensor]) -> None:
        values, ids = gathered["top values"], gathered["top ids"]
        self._merged = merge([values, ids, values])
        rows = values.shape[1]
        top, total = total_mass(gathered["raw mass"], torch.ones(rows, dtype=torch.float64))
        self._top, self._log_total = top, total.log()

    def ranks(self, token_ids: Tensor) -> Tensor:
        """Vocabulary rank (1 = best) of one token a row, int64 [n]; 0 where the head ends before."""
        merged = self._merged
        places = torch.arange(1, merged.tokens.token_ids.shape[1] + 1)
        found = merged.tokens.token_ids == token_ids[:, None]
        ranks = torch.where(found, places, 0).sum(-1)
        return torch.where(ranks <= merged.certain, ranks, 0)

    def entries(
        self, token_ids: Tensor, values: Tensor, ranks: Tensor, tops: Sequence[int]
    ) -> list[tuple[TokenLogprob, list[TokenLogprob]]]:
        """Row by row: the token's own entry, and the `tops[row]` best tokens."""
        width = max(tops)
        head = self._merged.tokens
        top_ids = head.token_ids[:, :width].tolist()
        top_logprobs = self._logprobs(head.values[:, :width]).tolist()
        own = zip(
            token_ids.tolist(),
            self._logprobs(values[:, None])[:, 0].tolist(),
            ranks.tolist(),
            strict=True,
        )
        return [
            (
                TokenLogprob(*entry),
                [
                    TokenLogprob(top_ids[row][place], top_logprobs[row][place], place + 1)
                    for place in range(top)
                ],
            )
            for row, (entry, top) in enumerate(zip(own, tops, strict=True))
        ]

    def _logprobs(self, values: Tensor) -> Tensor:
        """Of logits [n, m]; the maximum goes first, to lose nothing of a large one."""
        return values - self._top[:, None] - self._log_total[:, None]
