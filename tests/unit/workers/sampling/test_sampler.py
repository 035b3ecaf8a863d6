"""The sampler as a whole: right tokens, whatever the ranks, batch mates and row order."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.protos.errors import RequestFailed
from phalanx.protos.sampling import SamplingParams
from phalanx.workers.sampling.logits import is_plainly_greedy
from phalanx.workers.sampling.random import stream_key
from phalanx.workers.sampling.rows import SampleRow

VOCAB = 300
CUTS = [[300], [150, 150], [100, 150, 50], [0, 120, 1, 0, 179], [1, 0, 298, 1, 0]]


def key(row: SampleRow) -> int:
    return stream_key(row.params.seed, row.sample_index, len(row.token_ids))


def mixed_rows(row) -> list[SampleRow]:
    """Every kind of row, some of them twice with another seed."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "logprobs": 4},
        {"temperature": 1e-6},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 200, "logprobs": 0},
        {"top_p": 0.5, "temperature": 1.5},
        {"top_p": 0.999, "temperature": 5.0, "logprobs": 20},
        {"min_p": 0.05},
        {"top_k": 90, "top_p": 0.97, "min_p": 0.001, "temperature": 2.0},
        {"temperature": 0.0, "repetition_penalty": 1.8, "logprobs": 2},
        {"presence_penalty": 1.0, "frequency_penalty": 1.5, "top_p": 0.8},
        {"no_repeat_ngram_size": 2, "logit_bias": {7: 4.0, 290: 5.0}, "logprobs": 1},
        {"min_tokens": 30, "stop_token_ids": (3, 250), "bad_words_ids": ((6,), (7, 9))},
    ]
    tokens = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()
    return [
        row(tokens[: 9 + index], 5, sample_index=index % 3, seed=seed + index, **kind)
        for index, kind in enumerate(kinds)
        for seed in (0, 2**62)
    ]


def close(left, right) -> bool:
    """Equal decisions, and log-probabilities equal to 1e-5."""
    if (left.token_id, left.error, len(left.top)) != (right.token_id, right.error, len(right.top)):
        return False
    entries = zip([left.logprob, *left.top], [right.logprob, *right.top], strict=True)
    return all(
        (a is None and b is None)
        or ((a.token_id, a.rank) == (b.token_id, b.rank) and abs(a.logprob - b.logprob) < 1e-5)
        for a, b in entries
    )


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_tokens_are_those_of_the_whole_vocabulary(
    group, row, reference, random_logits, sizes, scale
) -> None:
    rows = mixed_rows(row)
    logits = random_logits(len(rows), VOCAB, seed=len(sizes), scale=scale)
    results = group(sizes).sample(logits, rows)
    expected = [reference.token(logits[i].numpy(), each, key(each)) for i, each in enumerate(rows)]
    assert [result.token_id for result in results] == expected
    assert all(result.error is None for result in results)


def best_of_slice(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a backend gives it: column and value of the largest, NaN where the row is broken."""
    if not part.shape[1]:
        return torch.zeros(len(part), dtype=torch.int64), torch.full((len(part),), -math.inf)
    broken = ~part.isfinite().all(-1)
    return part.argmax(-1), part.amax(-1).masked_fill(broken, math.nan)


@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_the_best_of_each_slice_gives_what_the_logits_give(
    group, row, random_logits, sizes
) -> None:
    ranks = group(sizes)
    logits = random_logits(12, VOCAB, seed=7).round(decimals=1)  # with ties
    logits[3, 130], logits[5, 299], logits[6] = math.nan, math.inf, 0.0
    kinds = [{"temperature": 0.0}, {"top_k": 1}]
    rows = [row([5, 6, 7], 2, **kinds[index % 2]) for index in range(12)]
    assert all(map(is_plainly_greedy, rows))
    expected = ranks.sample(logits, rows)
    assert [index for index, result in enumerate(expected) if result.error] == [3, 5]
    took = ranks.on_all(logits, lambda sampler, part: sampler.take_best(*best_of_slice(part)))
    assert took == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.0, "logit_bias": {3: 1.0}},
        {"top_k": 1, "repetition_penalty": 1.1},
        {"temperature": 0.0, "min_tokens": 9},
    ],
)
def test_rows_that_need_their_logits(row, fields) -> None:
    assert not is_plainly_greedy(row([5, 6, 7], 2, **fields))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_ranks(group, row, random_logits, kind) -> None:
    rows = mixed_rows(row)
    logits = random_logits(len(rows), VOCAB).to(kind)  # bfloat16: many equal logits
    alone = group(CUTS[0]).sample(logits, rows)
    for sizes in CUTS[1:]:
        assert all(map(close, group(sizes).sample(logits, rows), alone))


def test_result_does_not_depend_on_batch_mates_or_order(group, row, random_logits) -> None:
    rows = mixed_rows(row)
    logits = random_logits(len(rows), VOCAB)
    ranks = group([100, 150, 50])
    together = ranks.sample(logits, rows)
    for index, each in enumerate(rows):
        assert close(ranks.sample(logits[index : index + 1], [each])[0], together[index])
    order = list(range(len(rows)))
    random.Random(5).shuffle(order)
    shuffled = ranks.sample(logits[order], [rows[index] for index in order])
    assert all(close(shuffled[slot], together[index]) for slot, index in enumerate(order))


def test_seed_sample_index_and_position_each_change_the_draw(group, row, random_logits) -> None:
    logits = random_logits(1, VOCAB, scale=0.1).expand(40, -1)
    for rows in (
        [row(seed=seed) for seed in range(40)],
        [row(sample_index=index) for index in range(40)],
        [row([4] * (index + 1), 1) for index in range(40)],
    ):
        tokens = {result.token_id for result in group([200, 100]).sample(logits, rows)}
        assert len(tokens) > 25
    same = group([200, 100]).sample(logits, [row(seed=9)] * 40)
    assert len({result.token_id for result in same}) == 1


def test_greedy_ties_go_to_the_lowest_id(group, row) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, 110:] = 2.0
    logits[2, [299, 260, 101]] = 2.0
    for sizes in CUTS:
        results = group(sizes).sample(logits, [row(temperature=0.0)] * 3)
        assert [result.token_id for result in results] == [0, 110, 101]


def test_tiny_temperatures_neither_overflow_nor_hide_ties(group, row) -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, [40, 250]] = 30000.0
    filters = [{}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.2, "top_p": 0.99}]
    rows = [row(temperature=1e-300, **each) for each in filters]
    assert [r.token_id for r in group([100, 200]).sample(logits, rows)] == [40] * 4
    rows = [row(temperature=1e-6, seed=seed) for seed in range(4)]
    assert {r.token_id for r in group([100, 200]).sample(logits, rows)} <= {40, 250}


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_frequencies(group, row, reference, filters) -> None:
    logits = torch.tensor([[1.5, 0.0, 1.0, -1.0, 0.5, -2.0]])
    n, params = 4000, SamplingParams(**filters)
    rows = [row([2] * 3, 3, seed=seed, **filters) for seed in range(n)]
    results = group([2, 4]).sample(logits.expand(n, -1), rows)
    counts = np.bincount([result.token_id for result in results], minlength=6)
    keep = reference.filtered(logits[0].numpy(), params)
    p = np.zeros(6)
    p[keep] = logits[0].double()[keep.copy()].softmax(-1).numpy()
    assert counts[p == 0].sum() == 0
    np.testing.assert_allclose(counts / n, p, atol=4 * math.sqrt(0.25 / n))


class TestCollectives:
    """How often ranks meet; a step waits for each of these."""

    @pytest.mark.parametrize(
        "params",
        [
            {"temperature": 0.0},
            {},
            {"top_k": 50, "top_p": 0.9},
            {"top_k": 200},
            {"top_p": 0.5},
            {"temperature": 0.0, "logprobs": 5},
        ],
        ids=str,
    )
    def test_common_batches_need_one(self, group, row, random_logits, params) -> None:
        ranks = group([4000, 4000])
        ranks.sample(random_logits(8, 8000, scale=4.0), [row(**params)] * 8)
        assert ranks.calls == 1

    def test_an_empty_slice_adds_none(self, group, row) -> None:
        logits = torch.zeros(1, VOCAB)
        logits[0, 120] = 5.0
        ranks = group([120, 0, 180])
        assert ranks.sample(logits, [row(temperature=0.0, logprobs=1)])[0].logprob.rank == 1
        assert ranks.calls == 1

    def test_a_broken_row_adds_none(self, group, row) -> None:
        logits = torch.zeros(2, VOCAB)
        logits[0, 10], logits[1, 10] = math.nan, 50.0
        ranks = group([150, 150])
        ranks.sample(logits, [row(top_p=0.9), row(top_p=0.9)])
        assert ranks.calls == 1

    def test_deep_ranks_need_one_more(self, group, row) -> None:
        logits = torch.linspace(1, 0, VOCAB)[None]
        ranks = group([150, 150])
        result = ranks.sample(logits, [row(logit_bias={280: 100.0}, logprobs=0)])[0]
        assert (result.token_id, result.logprob.rank) == (280, 281)
        assert ranks.calls == 2

    def test_wide_filters_need_longer_lists(self, group, row, random_logits) -> None:
        ranks = group([4000, 4000])
        rows = [row(top_p=0.99, seed=seed) for seed in range(3)] + [row(top_k=3)]
        ranks.sample(random_logits(4, 8000, scale=0.5), rows)
        assert 2 <= ranks.calls <= 4


class TestFailures:
    """A row that cannot be sampled says so on all ranks; its mates are as without it."""

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("sizes", [[300], [100, 0, 200]], ids=str)
    def test_broken_logits(self, group, row, random_logits, bad, sizes) -> None:
        rows = mixed_rows(row)
        logits = random_logits(len(rows), VOCAB)
        whole = group(sizes).sample(logits, rows)
        broken = range(0, len(rows), 2)  # one of every kind
        for index in broken:
            logits[index, (index * 37) % VOCAB] = bad
        results = group(sizes).sample(logits, rows)
        for index, result in enumerate(results):
            if index in broken:
                assert "NaN" in result.error and result.token_id == 0 and result.logprob is None
            else:
                assert close(result, whole[index])

    @pytest.mark.parametrize(
        "params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"logprobs": 2}], ids=str
    )
    def test_everything_banned(self, group, row, params) -> None:
        logits = torch.zeros(2, 6)
        rows = [row([2], 1, bad_words_ids=tuple((i,) for i in range(6)), **params), row([2], 1)]
        for sizes in ([6], [2, 0, 4]):
            failed, fine = group(sizes).sample(logits, rows)
            assert "banned" in failed.error
            assert fine.error is None

    def test_prompt_scores_raise_on_every_rank(self, group, random_logits) -> None:
        logits = random_logits(3, VOCAB)
        logits[1, 250] = math.nan
        with pytest.raises(RequestFailed, match="NaN"):
            group([100, 200]).score(logits, [1, 2, 3], 2)


def test_no_rows(group) -> None:
    ranks = group([3, 3])
    assert ranks.sample(torch.zeros(0, 6), []) == []
    assert ranks.score(torch.zeros(0, 6), [], 3) == []
    assert ranks.calls == 0


params_of_all_kinds = st.builds(
    SamplingParams,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0, 10.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 20, 29, 30, 31, 10**6]),
    top_p=st.sampled_from([1.0, 0.9999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2]),
    min_tokens=st.integers(0, 3),
    logprobs=st.sampled_from([None, 0, 3, 20]),
)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.lists(
        st.tuples(
            st.lists(st.integers(0, 29), min_size=1, max_size=8),
            st.integers(1, 8),
            params_of_all_kinds,
            st.integers(0, 7),
        ),
        min_size=1,
        max_size=6,
    ),
    sizes=st.sampled_from([[30], [15, 15], [0, 29, 1], [3, 0, 20, 7]]),
    steps=st.sampled_from([2.0, 1000.0]),
    seed=st.integers(0, 100),
)
def test_any_batch_equals_the_whole_vocabulary(
    group, reference, random_logits, batch, sizes, steps, seed
) -> None:
    rows = [
        SampleRow(tokens, min(prompt, len(tokens)), params, index)
        for tokens, prompt, params, index in batch
    ]
    logits = (random_logits(len(rows), 30, seed=seed) * steps).round() / steps
    results = group(sizes).sample(logits, rows)
    for index, each in enumerate(rows):
        expected = reference.token(logits[index].numpy(), each, key(each))
        assert results[index].token_id == expected
