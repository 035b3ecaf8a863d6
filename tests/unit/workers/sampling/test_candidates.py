"""Filters over lists of several ranks, against transformers' warpers and the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phalanx.protos.sampling import SamplingParams
from phalanx.workers.sampling.candidates import (
    NO_TOKEN,
    Filters,
    best_columns,
    kept,
    local_candidates,
    local_mass,
    merge,
    total_mass,
)


def kept_ids(logits: torch.Tensor, params: SamplingParams, sizes: list[int], count: int):
    """Ids kept of one row by lists of `count`, or None when longer lists are needed."""
    parts = logits[None].split(sizes, dim=1)
    starts = np.cumsum([0, *sizes]).tolist()
    lists = [
        local_candidates(part, part, start, count)
        for part, start in zip(parts, starts, strict=False)
    ]
    merged = merge([torch.stack(field).double() for field in zip(*lists, strict=True)])
    filters = Filters.of([params], logits.numel())
    masses = torch.stack([local_mass(part, filters.temperature) for part in parts])
    cut = int(kept(merged, filters, total_mass(masses, filters.temperature)[1]))
    return merged.tokens.token_ids[0, :cut].tolist() if cut else None


def grown(logits: torch.Tensor, params: SamplingParams, sizes: list[int], count: int):
    ids = None
    while ids is None:
        assert count < 8 * (logits.numel() + 1), "never decided"
        ids = kept_ids(logits, params, sizes, count)
        count *= 2
    return ids


def by_transformers(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    scores = TemperatureLogitsWarper(params.temperature)(None, logits[None].double())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores[0]


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 399},
        {"top_p": 0.01},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 0.02},
        {"min_p": 0.7},
        {"top_k": 30, "top_p": 0.8},
        {"top_p": 0.8, "min_p": 0.1},
        {"top_k": 100, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
def test_kept_set_and_distribution_are_those_of_transformers(
    random_logits, filters, temperature, scale
) -> None:
    for seed in range(3):
        logits = random_logits(1, 400, seed=seed, scale=scale)[0]
        params = SamplingParams(temperature=temperature, **filters)
        theirs = by_transformers(logits, params)
        ours = grown(logits, params, [150, 1, 99, 150], count=8)
        assert sorted(ours) == theirs.isfinite().nonzero().flatten().tolist()
        mine = torch.full((400,), -math.inf, dtype=torch.float64)
        mine[ours] = logits[ours].double() / temperature
        torch.testing.assert_close(mine.softmax(-1), theirs.softmax(-1), rtol=1e-12, atol=0)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_short_lists_decide_rightly_or_not_at_all(reference, data) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    width = sum(sizes)
    levels = data.draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    values = data.draw(
        st.lists(st.integers(0, levels), min_size=width, max_size=width).map(np.array)
    )
    logits = torch.from_numpy(values / levels * data.draw(st.sampled_from([0.1, 2.0, 20.0])))
    logits = logits.float()
    banned = data.draw(st.lists(st.integers(0, width - 1), max_size=width - 1, unique=True))
    logits[banned[: width - 1]] = -math.inf
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([1e-6, 0.5, 1.0, 10.0])),
        top_k=data.draw(st.integers(0, width + 2)),
        top_p=data.draw(st.sampled_from([1.0, 0.001, 0.3, 0.5, 0.75, 0.999])),
        min_p=data.draw(st.sampled_from([0.0, 0.001, 0.3, 1.0])),
    )
    expected = reference.filtered(logits.numpy(), params).tolist()
    for count in range(1, max(sizes) + 2):
        ids = kept_ids(logits, params, sizes, count)
        assert ids is None or ids == expected
    assert ids == expected  # lists longer than every slice always decide


def test_top_k_is_decided_by_lists_of_k_even_among_ties() -> None:
    logits = torch.ones(1000)
    ids = kept_ids(logits, SamplingParams(top_k=5), [400, 400, 200], count=5)
    assert ids == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sizes", [[60], [7, 53], [20, 20, 20], [1, 2, 3, 54]], ids=str)
def test_top_p_reached_exactly_does_not_hang_on_rounding(sizes) -> None:
    # 60 equal tokens: k of them hold exactly k / 60, however the sum is rounded
    for level in (0.0, 1.7):
        for k in range(1, 60):
            params = SamplingParams(top_p=k / 60, temperature=0.7)
            assert len(kept_ids(torch.full((60,), level), params, sizes, count=61)) == k


def test_a_cut_beyond_the_lists_is_left_open() -> None:
    logits = torch.zeros(100)
    assert kept_ids(logits, SamplingParams(top_p=0.9), [50, 50], count=40) is None
    assert len(kept_ids(logits, SamplingParams(top_p=0.9), [50, 50], count=51)) == 90


def test_best_columns_order_ties_by_column() -> None:
    generator = torch.Generator().manual_seed(1)
    for levels, count in ((1, 7), (3, 50), (40, 200), (10**6, 64)):
        logits = torch.randint(0, levels, (6, 900), generator=generator).float()
        values, columns = best_columns(logits, count)
        order = np.stack([np.lexsort((np.arange(900), -row)) for row in logits.numpy()])
        assert columns.tolist() == order[:, :count].tolist()
        assert torch.equal(values, logits.gather(1, columns))


def test_padding_is_no_token() -> None:
    logits = torch.tensor([[1.0, -math.inf]])
    lists = local_candidates(logits, logits, 10, 4)
    assert lists.token_ids.tolist() == [[10, 11, NO_TOKEN, NO_TOKEN]]
    assert lists.values[0, 1:].tolist() == [-math.inf] * 3


def test_mass_survives_banned_slices_and_tiny_temperatures(random_logits) -> None:
    logits = random_logits(3, 50)
    logits[:, 20:30] = -math.inf
    temperature = torch.tensor([1.0, 0.25, 1e-6], dtype=torch.float64)
    parts = logits.split([20, 10, 20], dim=1)
    top, total = total_mass(
        torch.stack([local_mass(part, temperature) for part in parts]), temperature
    )
    scaled = logits.double() / temperature[:, None]
    torch.testing.assert_close(top / temperature + total.log(), scaled.logsumexp(-1))
