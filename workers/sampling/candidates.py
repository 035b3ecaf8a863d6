"""Best tokens of the whole vocabulary from each rank's best, and the filters on them.

Order everywhere: higher value first, equal values by lower token id. Every rank offers its own
first C tokens. Sorted together, they are the vocabulary's true order down to the first place
where some rank's list ends; what such a list leaves out comes later. Filters that cut above
that place are exact; where they do not, the caller asks for longer lists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.protos.sampling import SamplingParams

from .random import gumbel, rows_at_once, token_bits

SPARE = 64  # extra candidates, in case equal values stand where the list ends
NO_TOKEN = 2**52  # id of padding: after every token, exact in float64
PROBABILITY_SLACK = 1e-12  # a sum this close to top-p has reached it, however it was added up


class Candidates(NamedTuple):
    """Token lists of some rows, [..., rows, C]; `values` may be -inf for banned or no token."""

    values: Tensor
    """Logits after penalties and bans, before temperature."""
    token_ids: Tensor
    raw: Tensor
    """The model's own logits."""


class Merged(NamedTuple):
    """Lists of all ranks in the vocabulary's order."""

    tokens: Candidates
    """[rows, ranks * C], host memory."""
    certain: Tensor
    """int64 [rows]: so many leading tokens with finite values are the true order."""
    exhausted: Tensor
    """bool [rows]: every token with a finite value is there."""

    def select(self, rows: Tensor) -> Merged:
        """Some rows, by index or mask."""
        tokens = Candidates(*(field[rows] for field in self.tokens))
        return Merged(tokens, self.certain[rows], self.exhausted[rows])


class Filters(NamedTuple):
    """The rows' parameters as tensors [rows] in host memory."""

    temperature: Tensor
    top_k: Tensor
    """Tokens left by top-k; the vocabulary size for all."""
    top_p: Tensor
    min_p: Tensor
    limited: Tensor
    """bool: top-k leaves tokens out."""

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int) -> Filters:
        """Tensors for rows with these parameters."""
        top_k = torch.tensor([min(each.top_k or vocab_size, vocab_size) for each in params])
        return cls(
            temperature=torch.tensor([each.temperature for each in params], dtype=torch.float64),
            top_k=top_k,
            top_p=torch.tensor([each.top_p for each in params], dtype=torch.float64),
            min_p=torch.tensor([each.min_p for each in params], dtype=torch.float64),
            limited=top_k < vocab_size,
        )

    def select(self, rows: Tensor) -> Filters:
        """The parameters of some rows."""
        return Filters(*(column[rows] for column in self))


def best_columns(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each row's best `count` values of [n, m] (m >= count, no NaN) and their columns, in order."""
    width = logits.shape[1]
    values, columns = logits.topk(min(count + SPARE, width), dim=-1)
    if not bool((values[:, 1:] == values[:, :-1]).any()):
        return values[:, :count], columns[:, :count]
    # topk orders equal values as it likes
    columns, order = columns.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if count + SPARE < width:
        # and chooses freely among those at its end: where they pass the spare, look again
        last = values[:, count - 1]
        for row in ((values[:, -1] == last) & (last > -math.inf)).nonzero()[:, 0].tolist():
            above = int((values[row] > last[row]).sum())
            tied = (logits[row] == last[row]).nonzero()[: count - above, 0]
            columns[row, above:count] = tied
    return values[:, :count], columns[:, :count]


def local_candidates(logits: Tensor, raw: Tensor, first_id: int, count: int) -> Candidates:
    """This rank's `count` best of each row, padded with -inf; logits, raw: float32 [n, m]."""
    inside = min(count, logits.shape[1])
    values, columns = best_columns(logits, inside)
    shape = (logits.shape[0], count)
    padded = Candidates(
        values.new_full(shape, -math.inf),
        columns.new_full(shape, NO_TOKEN),
        values.new_zeros(shape),
    )
    padded.values[:, :inside] = values
    padded.token_ids[:, :inside] = columns + first_id
    padded.raw[:, :inside] = raw.gather(1, columns)
    return padded


def merge(gathered: Sequence[Tensor]) -> Merged:
    """Bring the ranks' lists (fields of `Candidates`, [ranks, rows, C]) into one order.

    Higher ranks hold higher token ids, so a stable sort by value leaves ties in id order.
    """
    count = gathered[0].shape[2]
    values, ids, raw = (part.transpose(0, 1).flatten(1) for part in gathered)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    finite = values > -math.inf
    ends = (order % count == count - 1) & finite  # the last of a rank that may hold more
    lengths = torch.arange(1, order.shape[1] + 1)
    certain = torch.where(ends, lengths, order.shape[1]).amin(-1)
    return Merged(
        Candidates(values, ids.gather(1, order).to(torch.int64), raw.gather(1, order)),
        torch.minimum(certain, finite.sum(-1)),
        ~ends.any(-1),
    )


def local_mass(logits: Tensor, temperatures: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Softmax denominators as float64 [n, 2]: maximum m, and the sum of exp((x - m) / T).

    The terms are computed in `dtype` and added in float64.
    """
    top = logits.amax(-1).double()
    shift = torch.where(top > -math.inf, top, 0.0)
    sums = torch.empty_like(shift)
    step = rows_at_once(logits)
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        scaled = logits[part].to(dtype) - shift[part, None].to(dtype)
        scaled.div_(temperatures[part, None].to(dtype))
        sums[part] = scaled.exp_().sum(-1, dtype=torch.float64)
    return torch.stack([top, sums], dim=-1)


def total_mass(gathered: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """All ranks' [ranks, n, 2] as (maximum m, sum of exp((x - m) / T)), float64 [n] each."""
    tops, sums = gathered.unbind(-1)
    top = tops.amax(0)
    shift = torch.where(top > -math.inf, top, 0.0)
    return top, (sums * ((tops - shift) / temperatures).exp()).sum(0)


def kept(merged: Merged, filters: Filters, total: Tensor) -> Tensor:
    """How many leading tokens the filters keep (int64 [rows]); 0 = longer lists are needed.

    total: float64 [rows], sum of exp((x - max) / T) over the vocabulary; read for rows with
    top-p and without top-k. Top-k first, top-p over what it left renormalised, then min-p
    against the best token. A row without any finite value keeps one (banned) token.
    """
    values, certain = merged.tokens.values, merged.certain
    width = values.shape[1]
    best = torch.where(values[:, :1] > -math.inf, values[:, :1], 0.0)
    temperature = filters.temperature[:, None]
    weights = ((values - best) / temperature).exp()
    weights *= torch.arange(width) < filters.top_k[:, None]
    reached = weights.cumsum(-1)
    total = torch.where(filters.limited, reached[:, -1], total)
    goal = filters.top_p * total * (1.0 - PROBABILITY_SLACK)
    by_p = (reached < goal[:, None]).sum(-1) + 1
    by_p = torch.where(filters.top_p < 1.0, by_p, width)
    floor = best + temperature * filters.min_p.log()[:, None]  # -inf without min-p
    by_min = (values >= floor).sum(-1)
    cut = torch.minimum(torch.minimum(filters.top_k, by_p), by_min)

    bound = values.gather(1, (certain - 1).clamp(min=0)[:, None])
    known_k = filters.top_k <= certain
    known_p = (filters.top_p < 1.0) & (by_p <= certain)
    known_min = (filters.min_p > 0.0) & (bound < floor)[:, 0]
    total_known = ~filters.limited | known_k | (filters.top_p >= 1.0)
    decided = merged.exhausted | (total_known & (known_k | known_p | known_min))
    return torch.where(decided, torch.minimum(cut, certain).clamp(min=1), 0)


def draw(tokens: Candidates, cut: Tensor, filters: Filters, keys: Tensor) -> Tensor:
    """Gumbel-max over each row's first `cut` candidates: the winners' places, int64 [rows]."""
    width = int(cut.max())
    ids = tokens.token_ids[:, :width]
    noise = gumbel(token_bits(keys[:, None], ids)).mul_(filters.temperature[:, None])
    raced = tokens.values[:, :width] + noise
    raced.masked_fill_(torch.arange(width) >= cut[:, None], -math.inf)
    tied = raced == raced.amax(-1, keepdim=True)
    return torch.where(tied, ids, NO_TOKEN + 1).argmin(-1)
