"""The next tokens of a batch, chosen by ranks that each hold a slice of the vocabulary.

The full logits are never brought together. In one collective every rank offers, for each row,
the best token of its slice (greedy rows, and rows without filters, where noise makes sampling a
maximum: Gumbel-max) or a short list of candidates (top-k, top-p, min-p). All ranks then decide
from the same gathered data. Further collectives are needed only where a filter keeps more than
the lists show, or a log-probability's rank lies below them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phalanx.protos.errors import InvalidArgument, PhalanxError, RequestFailed
from phalanx.protos.shards import Span
from phalanx.protos.steps import TokenLogprob
from phalanx.workers.parallel import TensorParallel
from phalanx.workers.transfer import upload

from .candidates import NO_TOKEN
from .exchange import exchange
from .filtered import FilteredRows
from .logits import adjust, is_adjusted
from .logprobs import Distribution, better_tokens, local_parts
from .random import first_max, gumbel_max
from .rows import Chosen, SampleRow, is_filtered, is_greedy, select_rows, stream_keys

__all__ = ["SampleRow", "Sampled", "Sampler"]

SPARE_RANKS = 12  # top entries gathered beyond those asked for: they often rank the sampled token

BROKEN = "the model's logits hold NaN or infinite values"
ALL_BANNED = "every token is banned (bad words, n-grams, biases, min_tokens or the grammar)"


class Sampled(NamedTuple):
    """One row's outcome; with an `error`, `token_id` is 0 and means nothing."""

    token_id: int
    logprob: TokenLogprob | None
    top: list[TokenLogprob]
    error: str | None = None
    field: str = ""
    """The request's field that is to blame for the error; empty: none of them."""


def failed(error: PhalanxError) -> Sampled:
    """The outcome of a row that cannot be sampled."""
    if isinstance(error, InvalidArgument):
        first = error.violations[0]
        return Sampled(0, None, [], first.description, first.field)
    return Sampled(0, None, [], str(error))


class _Groups(NamedTuple):
    """Indices of the batch's rows by what they need."""

    adjusted: list[int]
    greedy: list[int]
    plain: list[int]
    filtered: list[int]
    scored: list[int]

    @classmethod
    def of(cls, rows: Sequence[SampleRow], vocab_size: int) -> _Groups:
        groups = cls([], [], [], [], [])
        for index, row in enumerate(rows):
            params = row.params
            if is_adjusted(row):
                groups.adjusted.append(index)
            if params.logprobs is not None:
                groups.scored.append(index)
            if is_greedy(params):
                groups.greedy.append(index)
            elif is_filtered(params, vocab_size):
                groups.filtered.append(index)
            else:
                groups.plain.append(index)
        return groups


class Sampler:
    """Chooses tokens; all ranks call with equal rows and get equal results."""

    def __init__(
        self, group: TensorParallel, vocab: Span, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._group, self._vocab, self._vocab_size = group, vocab, vocab_size
        self._eos_token_ids = eos_token_ids
        self._first_id = vocab.start if vocab.size else NO_TOKEN

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """One token for each row.

        logits: this rank's slice [rows, vocab.size], any floating type; may be overwritten.
        A row that cannot be sampled gets an `error`; the others are unaffected.
        """
        if not rows:
            return []
        groups = _Groups.of(rows, self._vocab_size)
        logits, broken = self._prepare(logits)
        raw = logits.clone() if groups.scored and groups.adjusted else logits
        for index in groups.adjusted:
            if self._vocab.size:
                adjust(logits[index], rows[index], self._vocab, self._eos_token_ids)
        first_id, vocab_size = self._first_id, self._vocab_size
        filtered = FilteredRows(logits, raw, rows, groups.filtered, first_id, vocab_size)
        tops = [rows[index].params.logprobs or 0 for index in groups.scored]
        parts = {"broken": broken, "slice": broken.new_tensor([self._vocab.size])}
        parts |= self._local_winners(logits, raw, rows, groups) | filtered.first_parts()
        if groups.scored:
            head = min(max(tops) + SPARE_RANKS, self._vocab_size)
            parts |= local_parts(select_rows(raw, groups.scored), first_id, head)
        gathered = exchange(self._group, parts)
        failed = gathered["broken"].amax(0) > 0
        chosen = Chosen.empty(len(rows))
        unfiltered = torch.tensor(groups.greedy + groups.plain, dtype=torch.int64)
        chosen.put(unfiltered, *_merge_winners(gathered["winners"]))
        filtered.decide(self._group, gathered, failed, chosen)
        logprobs = self._logprobs(gathered, raw, groups.scored, chosen, tops)
        return _results(chosen, failed.tolist(), groups.scored, logprobs)

    @torch.inference_mode()
    def take_best(self, columns: Tensor, values: Tensor) -> list[Sampled]:
        """What `sample` gives for rows that are all `is_plainly_greedy`.

        columns, values [rows]: the largest logit of this rank's slice, NaN where one is broken.
        """
        if self._group.size == 1:
            pairs = zip(columns.tolist(), values.tolist(), strict=True)
            return [
                Sampled(0, None, [], BROKEN)
                if math.isnan(value)
                else Sampled(self._first_id + column, None, [])
                for column, value in pairs
            ]
        broken = values.isnan()
        values = values.masked_fill(broken, 0.0).double()
        ids = (columns + self._first_id).double()
        # the parts of `sample`, as another rank may call that
        parts = {"broken": broken.float(), "slice": values.new_tensor([self._vocab.size])}
        parts["winners"] = torch.stack([ids, values, values], dim=-1)
        gathered = exchange(self._group, parts)
        chosen = Chosen.empty(len(columns))
        chosen.put(torch.arange(len(columns)), *_merge_winners(gathered["winners"]))
        return _results(chosen, (gathered["broken"].amax(0) > 0).tolist(), [], [])

    @torch.inference_mode()
    def score(
        self, logits: Tensor, targets: Sequence[int], top: int
    ) -> list[tuple[TokenLogprob, list[TokenLogprob]]]:
        """Log-probability of targets[i] under logits[i], and the `top` best tokens there.

        logits: this rank's slice [rows, vocab.size]. Two collectives. Raises `RequestFailed`,
        on every rank, when logits are NaN or infinite.
        """
        if not targets:
            return []
        vocab = self._vocab
        logits, broken = self._prepare(logits)
        token_ids = torch.tensor(targets)
        columns = (token_ids - vocab.start).to(logits.device)
        mine = (columns >= 0) & (columns < vocab.size)
        columns = columns.clamp(0, logits.shape[1] - 1)
        values = torch.where(mine, logits.gather(1, columns[:, None])[:, 0], -math.inf)
        parts = {"broken": broken, "targets": values}
        parts |= local_parts(logits, self._first_id, max(top, 1))
        gathered = exchange(self._group, parts)
        if gathered["broken"].any():
            raise RequestFailed(BROKEN)
        values = gathered["targets"].amax(0)
        better = better_tokens(logits, self._first_id, values, token_ids)
        ranks = exchange(self._group, {"better": better})["better"].sum(0).to(torch.int64) + 1
        tops = [top] * len(targets)
        return Distribution(gathered).entries(token_ids, values, ranks, tops)

    def _prepare(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """float32 logits with at least one column, and float32 [rows]: 1 = broken, now zeros.

        A rank without vocabulary gets a column that no token can win with.
        """
        logits = logits.float()
        if not self._vocab.size:
            return logits.new_full((logits.shape[0], 1), -math.inf), logits.new_zeros(len(logits))
        broken = ~(logits.amin(-1).isfinite() & logits.amax(-1).isfinite())
        # another device would have to be waited for, to know
        if logits.device.type != "cpu":
            logits.masked_fill_(broken[:, None], 0.0)
        elif bool(broken.any()):
            logits[broken] = 0.0
        return logits, broken.float()

    def _local_winners(
        self, logits: Tensor, raw: Tensor, rows: Sequence[SampleRow], groups: _Groups
    ) -> dict[str, Tensor]:
        """(id, value, raw) of this slice's best token for greedy, then plain rows: [r, 3]."""
        outcomes = []
        if groups.greedy:
            outcomes.append(first_max(select_rows(logits, groups.greedy)))
        if groups.plain:
            plain = [rows[index] for index in groups.plain]
            warmth = np.array([row.params.temperature for row in plain], dtype=np.float64)
            temperatures = upload(warmth, logits.device)
            keys = upload(stream_keys(plain).numpy(), logits.device)
            part = select_rows(logits, groups.plain)
            outcomes.append(gumbel_max(part, temperatures, keys, self._first_id))
        if not outcomes:
            return {"winners": logits.new_zeros(0, 3)}
        values = torch.cat([value.double() for value, _ in outcomes])
        columns = torch.cat([column for _, column in outcomes])
        index = upload(np.array(groups.greedy + groups.plain, dtype=np.int64), logits.device)
        ids = (columns + self._first_id).double()
        return {"winners": torch.stack([ids, values, raw[index, columns].double()], dim=-1)}

    def _logprobs(
        self,
        gathered: dict[str, Tensor],
        raw: Tensor,
        scored: list[int],
        chosen: Chosen,
        tops: list[int],
    ) -> list[tuple[TokenLogprob, list[TokenLogprob]]]:
        if not scored:
            return []
        distribution = Distribution(gathered)
        token_ids, values = chosen.token_ids[scored], chosen.raw[scored]
        ranks = distribution.ranks(token_ids)
        below = (ranks == 0).nonzero()[:, 0]
        if below.numel():
            lost = select_rows(raw, [scored[slot] for slot in below.tolist()])
            better = better_tokens(lost, self._first_id, values[below], token_ids[below])
            counts = exchange(self._group, {"better": better})["better"].sum(0)
            ranks[below] = counts.to(torch.int64) + 1
        return distribution.entries(token_ids, values, ranks, tops)


def _merge_winners(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Winners over the ranks' (id, value, raw), [size, r, 3]: ids, values, raw; float64 [r]."""
    ids, values, _ = gathered.unbind(-1)
    lowest = torch.where(values == values.amax(0), ids, math.inf).argmin(0)
    won = gathered[lowest, torch.arange(gathered.shape[1])]
    return won[:, 0], won[:, 1], won[:, 2]


def _results(
    chosen: Chosen,
    broken: list[bool],
    scored: list[int],
    logprobs: list[tuple[TokenLogprob, list[TokenLogprob]]],
) -> list[Sampled]:
    entries = dict(zip(scored, logprobs, strict=True))
    banned = (chosen.values == -math.inf).tolist()
    results = []
    for index, token_id in enumerate(chosen.token_ids.tolist()):
        if broken[index]:
            results.append(Sampled(0, None, [], BROKEN))
        elif banned[index]:
            results.append(Sampled(0, None, [], ALL_BANNED, "params"))
        else:
            entry, top = entries.get(index, (None, []))
            results.append(Sampled(token_id, entry, top))
    return results
