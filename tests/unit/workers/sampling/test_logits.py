"""Penalties and bans against transformers' processors and a token-by-token model."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import Span
from phalanx.workers.sampling.logits import adjust, is_adjusted
from phalanx.workers.sampling.rows import SampleRow

VOCAB = 60
EOS = (1,)


def adjusted(logits: torch.Tensor, row: SampleRow, cuts: tuple[int, ...] = (0, 13, 14, VOCAB)):
    """The row's logits, adjusted slice by slice."""
    result = logits.clone()
    for start, stop in pairwise(cuts):
        adjust(result[start:stop], row, Span(start, stop), EOS)
    return result


def sequence(length: int, seed: int = 0, choices: int = 8) -> list[int]:
    return np.random.default_rng(seed).integers(2, 2 + choices, length).tolist()


@pytest.fixture
def logits(random_logits) -> torch.Tensor:
    return random_logits(1, VOCAB, seed=8)[0]


def by_transformers(processor, logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    return processor(torch.tensor([tokens]), logits[None].clone())[0]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_penalty(logits, row, penalty: float) -> None:
    tokens = sequence(30)
    ours = adjusted(logits, row(tokens, 20, repetition_penalty=penalty))
    theirs = by_transformers(RepetitionPenaltyLogitsProcessor(penalty), logits, tokens)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30, 40])
@pytest.mark.parametrize("length", [1, 2, 29, 30, 200])
def test_no_repeat_ngram(logits, row, size: int, length: int) -> None:
    tokens = sequence(length, seed=size, choices=3)
    ours = adjusted(logits, row(tokens, 1, no_repeat_ngram_size=size))
    theirs = by_transformers(NoRepeatNGramLogitsProcessor(size), logits, tokens)
    assert torch.equal(ours, theirs)


def test_ngrams_do_ban(logits, row) -> None:
    ours = adjusted(logits, row([4, 5, 6, 9, 4, 5], 6, no_repeat_ngram_size=3))
    assert (ours == -math.inf).nonzero().flatten().tolist() == [6]


def test_bad_words(logits, row) -> None:
    tokens = [9, 2, 3, 4]
    words = ((7,), (3, 4, 20), (4, 3, 21), (4, 22), (9, 2, 3, 4), (4, 4), (2, 3, 4, 23))
    ours = adjusted(logits, row(tokens, 2, bad_words_ids=words))
    theirs = by_transformers(
        NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None), logits, tokens
    )
    assert torch.equal(ours, theirs)
    assert (ours == -math.inf).nonzero().flatten().tolist() == [4, 7, 20, 22, 23]


def test_a_bad_word_longer_than_the_sequence_does_not_ban(logits, row) -> None:
    unchanged = adjusted(logits, row([3], 1, bad_words_ids=((2, 3, 4), (3, 3, 3, 3))))
    assert torch.equal(unchanged, logits)


@pytest.mark.parametrize("generated", [0, 2, 3, 4])
def test_min_tokens(logits, row, generated: int) -> None:
    tokens = sequence(5 + generated)
    ours = adjusted(logits, row(tokens, 5, min_tokens=3))
    processor = MinNewTokensLengthLogitsProcessor(5, 3, list(EOS), device="cpu")
    assert torch.equal(ours, by_transformers(processor, logits, tokens))


def test_min_tokens_bans_only_what_would_stop(logits, row) -> None:
    params = {"min_tokens": 3, "stop_token_ids": (30, 14)}
    banned = adjusted(logits, row([5], 1, **params)) == -math.inf
    assert banned.nonzero().flatten().tolist() == [1, 14, 30]
    banned = adjusted(logits, row([5], 1, ignore_eos=True, **params)) == -math.inf
    assert banned.nonzero().flatten().tolist() == [14, 30]


def test_presence_and_frequency_count_output_only(logits, row) -> None:
    ours = adjusted(
        logits, row([8, 8, 9, 9, 10, 9], 3, presence_penalty=0.5, frequency_penalty=0.25)
    )
    change = {int(i): float(logits[i] - ours[i]) for i in (ours != logits).nonzero()}
    assert change == pytest.approx({9: 1.0, 10: 0.75}, abs=1e-6)


def test_bias_comes_before_bans(logits, row) -> None:
    ours = adjusted(logits, row([5], 1, logit_bias={4: 100.0, 30: -2.5}, bad_words_ids=((4,),)))
    assert ours[4] == -math.inf
    assert float(ours[30]) == pytest.approx(float(logits[30]) - 2.5)


def test_plain_rows_are_left_alone(row) -> None:
    assert not is_adjusted(row(temperature=0.3, top_k=5, top_p=0.5, min_p=0.1, logprobs=3))
    assert not is_adjusted(row([5, 6, 7, 8], 3, min_tokens=1))
    assert is_adjusted(row([5, 6, 7], 3, min_tokens=1))


ids = st.integers(0, VOCAB - 1)
params_of_all_kinds = st.builds(
    SamplingParams,
    repetition_penalty=st.floats(0.01, 10.0),
    presence_penalty=st.floats(-2.0, 2.0),
    frequency_penalty=st.floats(-2.0, 2.0),
    logit_bias=st.dictionaries(ids, st.floats(-100.0, 100.0), max_size=6),
    bad_words_ids=st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), max_size=6
    ).map(tuple),
    no_repeat_ngram_size=st.integers(0, 4),
    min_tokens=st.integers(0, 12),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=25),
    output=st.integers(0, 25),
    params=params_of_all_kinds,
    cut=st.integers(0, VOCAB),
)
def test_any_mixture_equals_the_token_by_token_model(
    reference, random_logits, tokens, output, params, cut
) -> None:
    row = SampleRow(tokens, max(1, len(tokens) - output), params, 0)
    logits = random_logits(1, VOCAB, seed=len(tokens))[0]
    ours = adjusted(logits, row, (0, cut, VOCAB))
    expected = reference.processed(logits.numpy(), row)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)
