"""Choosing on the device gives the sampler's tokens."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.kernels.reference import ReferenceBackend
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.shards import cut
from phalanx.workers.parallel import SingleRank, ThreadRank
from phalanx.workers.sampling.plain import PlainChoice
from phalanx.workers.sampling.random import mixed, sample_key, stream_key
from phalanx.workers.sampling.sampler import BROKEN, Sampler, SampleRow
from phalanx.workers.sampling.threshold import RowFilters


def on_ranks(size: int, work: Any) -> list[Any]:
    """`work(group)` on every rank."""
    groups = [SingleRank()] if size == 1 else ThreadRank.group(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        results[rank] = work(groups[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@given(st.integers(0, 2**64 - 1), st.integers(0, 7), st.lists(st.integers(0, 2**40), min_size=1))
def test_keys_on_the_device_are_those_of_the_host(
    seed: int, sample: int, positions: list[int]
) -> None:
    keys = torch.full((len(positions),), sample_key(seed, sample))
    expected = [stream_key(seed, sample, position) for position in positions]
    assert mixed(keys, torch.tensor(positions)).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.sampled_from([2, 9, 100000]), vocab=st.integers(1, 70))
def test_the_sampler_s_tokens(size: int, seed: int, levels: int, vocab: int) -> None:
    """Logits of few levels tie; more ranks than tokens leave some without any; some are broken."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (7, vocab), generator=draw).float() * (8.0 / levels)
    if seed % 3 == 0:
        logits[3, seed % vocab] = (torch.nan, torch.inf, -torch.inf)[seed % 7 % 3]
    warmth = [0.0, 0.3, 1.0, 0.7, 4.0, 1e-3, 0.0]
    rows = [
        SampleRow([1] * (4 + row), 3, SamplingParams(seed=seed + row, temperature=heat), row)
        for row, heat in enumerate(warmth)
    ]

    def sampled(group: Any) -> list[tuple[int, bool]]:
        span = cut(vocab, size, group.rank)
        sampler = Sampler(group, span, vocab, ())
        results = sampler.sample(logits[:, span.start : span.stop].clone(), rows)
        return [(result.token_id, result.error == BROKEN) for result in results]

    def chosen(group: Any) -> list[tuple[int, bool]]:
        span = cut(vocab, size, group.rank)
        choice = PlainChoice(group, span, ReferenceBackend())
        tokens, broken = choice.drawn(
            logits[:, span.start : span.stop].clone(),
            torch.tensor(warmth, dtype=torch.float64),
            torch.tensor([sample_key(row.params.seed, row.sample_index) for row in rows]),
            torch.tensor([len(row.token_ids) for row in rows]),
        )
        greedy, failed = choice.greedy(logits[:, span.start : span.stop].clone())
        assert failed.equal(broken)
        assert greedy[[0, 6]].equal(tokens[[0, 6]])
        return list(zip(tokens.tolist(), broken.tolist(), strict=True))

    expected = on_ranks(size, sampled)
    assert expected == on_ranks(size, chosen) and len(set(map(tuple, expected))) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.sampled_from([2, 9, 100000]), vocab=st.integers(1, 70))
def test_the_sampler_s_tokens_where_filters_leave_some_out(
    size: int, seed: int, levels: int, vocab: int
) -> None:
    """Logits tie where filters end, a filter leaves more than a rank has, ranks have no tokens."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (9, vocab), generator=draw).float() * (5.0 / levels)
    if seed % 3 == 0:
        logits[3, seed % vocab] = (torch.nan, torch.inf, -torch.inf)[seed % 7 % 3]
    chance = torch.rand(9, 3, generator=draw).tolist()
    rows = []
    for row, (heat, top_p, min_p) in enumerate(chance):
        params = SamplingParams(
            seed=seed + row,
            temperature=(0.05 + 3 * heat) * (row != 4),
            top_k=(0, 1, 2, 5, 20, 80)[(seed + row) % 6],
            top_p=top_p if row % 2 else 1.0,
            min_p=min_p if row % 3 == 0 else 0.0,
        )
        rows.append(SampleRow([1] * (4 + row), 3, params, row))

    def sampled(group: Any) -> list[tuple[int, bool]]:
        span = cut(vocab, size, group.rank)
        sampler = Sampler(group, span, vocab, ())
        results = sampler.sample(logits[:, span.start : span.stop].clone(), rows)
        return [(result.token_id, result.error == BROKEN) for result in results]

    def chosen(group: Any) -> list[tuple[int, bool]]:
        span = cut(vocab, size, group.rank)
        choice = PlainChoice(group, span, ReferenceBackend())
        numbers = [RowFilters.numbers(row.params, vocab) for row in rows]
        tokens, broken = choice.filtered(
            logits[:, span.start : span.stop].clone(),
            RowFilters(*torch.tensor(numbers, dtype=torch.float64).unbind(1)),
            torch.tensor([sample_key(row.params.seed, row.sample_index) for row in rows]),
            torch.tensor([len(row.token_ids) for row in rows]),
        )
        return list(zip(tokens.tolist(), broken.tolist(), strict=True))

    expected = on_ranks(size, sampled)
    assert expected == on_ranks(size, chosen) and len(set(map(tuple, expected))) == 1
