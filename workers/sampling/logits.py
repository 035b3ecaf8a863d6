"""Penalties, biases and bans: what changes single logits before a token is chosen.

Every function works on one rank's slice of one row and touches only the entries it must.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import Span
from phalanx.workers.transfer import upload

from .penalties import is_penalised
from .rows import SampleRow, is_greedy

Ids = NDArray[np.int64]


def is_adjusted(row: SampleRow) -> bool:
    """Whether any logit of this row changes before temperature."""
    return is_penalised(row.params) or _is_edited(row)


def _is_edited(row: SampleRow) -> bool:
    """Whether single logits change for another reason than the tokens that came before."""
    params = row.params
    return bool(
        params.logit_bias
        or params.bad_words_ids
        or params.no_repeat_ngram_size
        or params.min_tokens > row.num_output
        or row.allowed is not None
    )


def is_plainly_greedy(row: SampleRow) -> bool:
    """Whether the row takes the largest of its logits as they are, and nothing more is asked."""
    params = row.params
    return is_greedy(params) and params.logprobs is None and not is_adjusted(row)


def is_plain(row: SampleRow) -> bool:
    """Whether all that is wanted is a token, by temperature, filters and penalties.

    A row with a grammar is not plain, even where nothing is known yet of what that allows.
    """
    params = row.params
    return params.logprobs is None and params.grammar is None and not _is_edited(row)


def adjust(logits: Tensor, row: SampleRow, vocab: Span, eos_token_ids: Sequence[int]) -> None:
    """Change one row's slice of the logits in place.

    logits: float32 [vocab.size]. The order is that of `SamplingParams`: repetition penalty,
    presence and frequency penalty, bias, bans, grammar.
    """
    params = row.params
    tokens = np.empty(0, dtype=np.int64)
    if _reads_tokens(params):
        tokens = np.asarray(row.token_ids, dtype=np.int64)
    if params.repetition_penalty != 1.0:
        _penalise_repetition(logits, _local(tokens, vocab), params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        _penalise_output(logits, _local(tokens[row.num_prompt :], vocab), params)
    if params.logit_bias:
        _add_bias(logits, params.logit_bias, vocab)
    banned = banned_tokens(row, tokens, eos_token_ids)
    if banned.size:
        logits[_index(_local(banned, vocab), logits)] = -math.inf
    if row.allowed is not None:
        bits = np.frombuffer(row.allowed, np.uint8)
        allowed = np.unpackbits(bits, count=vocab.stop, bitorder="little")[vocab.start :]
        logits.masked_fill_(torch.from_numpy(allowed == 0).to(logits.device), -math.inf)


def _reads_tokens(params: SamplingParams) -> bool:
    penalised = params.repetition_penalty != 1.0 or params.presence_penalty
    return bool(penalised or params.frequency_penalty or params.no_repeat_ngram_size)


def _local(ids: Ids, vocab: Span) -> Ids:
    """Offsets into the slice of those `ids` that lie in it."""
    return ids[(ids >= vocab.start) & (ids < vocab.stop)] - vocab.start


def _index(offsets: Ids, logits: Tensor) -> Tensor:
    return upload(offsets, logits.device)


def _penalise_repetition(logits: Tensor, offsets: Ids, penalty: float) -> None:
    index = _index(offsets, logits)
    values = logits[index]
    # repeated ids write the same value again
    logits[index] = torch.where(values > 0, values / penalty, values * penalty)


def _penalise_output(logits: Tensor, offsets: Ids, params: SamplingParams) -> None:
    offsets, counts = np.unique(offsets, return_counts=True)
    penalties = params.frequency_penalty * counts + params.presence_penalty
    logits[_index(offsets, logits)] -= torch.from_numpy(penalties).to(logits)


def _add_bias(logits: Tensor, bias: dict[int, float], vocab: Span) -> None:
    inside = [(key - vocab.start, bias[key]) for key in bias if vocab.start <= key < vocab.stop]
    if inside:
        offsets, values = zip(*inside, strict=True)
        logits[_index(np.asarray(offsets), logits)] += torch.tensor(values).to(logits)


def banned_tokens(row: SampleRow, tokens: Ids, eos_token_ids: Sequence[int]) -> Ids:
    """Ids that must not come next. `tokens`: the sequence, needed for n-grams only."""
    params = row.params
    banned: list[int] = []
    if params.min_tokens > row.num_output:
        banned.extend(params.stop_token_ids)
        if not params.ignore_eos:
            banned.extend(eos_token_ids)
    for word in params.bad_words_ids:
        known = len(word) - 1
        if not known or tuple(row.token_ids[-known:]) == word[:-1]:
            banned.append(word[-1])
    ids = np.asarray(banned, dtype=np.int64)
    if params.no_repeat_ngram_size:
        ids = np.concatenate([ids, repeated_ngrams(tokens, params.no_repeat_ngram_size)])
    return ids


def repeated_ngrams(tokens: Ids, size: int) -> Ids:
    """Ids that would complete an n-gram of `size` tokens that `tokens` already holds."""
    known = size - 1
    if tokens.size < size:
        return tokens[:0]
    tail = tokens[tokens.size - known :]
    starts = np.arange(tokens.size - known)
    for offset in range(known - 1, -1, -1):  # few places survive the first comparison
        starts = starts[tokens[starts + offset] == tail[offset]]
    return tokens[starts + known]
