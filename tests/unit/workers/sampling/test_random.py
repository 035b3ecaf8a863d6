"""The random numbers: right, uniform, independent, and right at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from phalanx.workers.sampling.random import (
    first_max,
    gumbel,
    gumbel_max,
    mix64,
    stream_key,
    token_bits,
    uniform,
)


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    """Standard deviations by which the chi-square statistic is off its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def draws(keys: list[int], ids: range) -> np.ndarray:
    bits = token_bits(torch.tensor(keys)[:, None], torch.tensor(ids))
    return uniform(bits).numpy()


def test_stream_is_splitmix64() -> None:
    # first outputs of the reference implementation for seed 0
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    bits = token_bits(torch.tensor([0]), torch.arange(4))
    assert bits.tolist() == [value >> 12 for value in known]
    assert mix64(0x9E3779B97F4A7C15) == known[0]


def test_noise_agrees_with_unsigned_arithmetic(reference) -> None:
    for key in (0, -1, 2**63 - 1, -(2**63), stream_key(7, 1, 9)):
        noise = gumbel(token_bits(torch.tensor([key]), torch.arange(1000)))
        np.testing.assert_allclose(noise.numpy(), reference.gumbel(key, 1000), rtol=1e-13)


def test_ends_of_the_interval_stay_finite() -> None:
    ends = torch.tensor([0, 2**52 - 1])
    assert uniform(ends).tolist() == [2.0**-53, 1.0 - 2.0**-53]
    high, low = gumbel(ends).tolist()
    assert high == pytest.approx(53 * math.log(2)) and low == pytest.approx(
        -math.log(53 * math.log(2))
    )


def test_uniform_within_a_step_and_across_steps() -> None:
    across_ids = draws([stream_key(1, 0, 5)], range(200_000))[0]
    across_positions = draws([stream_key(1, 0, p) for p in range(50_000)], range(3, 4))[:, 0]
    across_seeds = draws([stream_key(s, 0, 5) for s in range(50_000)], range(3, 4))[:, 0]
    for values in (across_ids, across_positions, across_seeds):
        counts = np.bincount((values * 256).astype(int), minlength=256)
        assert abs(chi_square(counts, values.size / 256)) < 4
        low = np.bincount((values * 2**52).astype(np.int64) % 256, minlength=256)
        assert abs(chi_square(low, values.size / 256)) < 4


@pytest.mark.parametrize("axis", ["neighbour", "position", "seed", "sample"])
def test_pairs_are_independent(axis: str) -> None:
    n = 100_000
    first = draws([stream_key(11, 0, 40)], range(n))[0]
    second = {
        "neighbour": lambda: draws([stream_key(11, 0, 40)], range(1, n + 1))[0],
        "position": lambda: draws([stream_key(11, 0, 41)], range(n))[0],
        "seed": lambda: draws([stream_key(12, 0, 40)], range(n))[0],
        "sample": lambda: draws([stream_key(11, 1, 40)], range(n))[0],
    }[axis]()
    cells = (first * 16).astype(int) * 16 + (second * 16).astype(int)
    assert abs(chi_square(np.bincount(cells, minlength=256), n / 256)) < 4
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(n)


def test_key_parts_are_not_interchangeable() -> None:
    keys = {stream_key(s, i, p) for s in range(30) for i in range(8) for p in range(30)}
    assert len(keys) == 30 * 8 * 30
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert stream_key(2**63 - 1, 7, 10**6) != stream_key(2**63 - 2, 7, 10**6)


def test_frequencies_follow_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, -math.inf])
    n, temperature = 60_000, 0.8
    keys = torch.tensor([stream_key(3, 0, position) for position in range(n)])
    temperatures = torch.full((n,), temperature, dtype=torch.float64)
    _, tokens = gumbel_max(logits.repeat(n, 1), temperatures, keys, 0)
    counts = np.bincount(tokens.numpy(), minlength=7)
    p = (logits.double() / temperature).softmax(-1).numpy()
    assert counts[6] == 0
    assert abs(chi_square(counts[:6], n * p[:6])) < 4
    np.testing.assert_allclose(counts / n, p, atol=0.006)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 8.0, 1e4])
@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 0.3, 1.0, 10.0])
def test_screened_race_equals_the_full_race(reference, scale: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(40, 3000, generator=generator) * scale
    logits[5:, ::7] = -math.inf
    keys = torch.tensor([stream_key(i, 0, 3) for i in range(40)])
    temperatures = torch.full((40,), temperature, dtype=torch.float64)
    best, column = gumbel_max(logits, temperatures, keys, 100)
    for i in range(40):
        noise = reference.gumbel(int(keys[i]), 3100)[100:]
        raced = logits[i].double().numpy() + temperature * noise
        assert column[i] == np.argmax(raced)
        assert best[i] == pytest.approx(raced.max(), rel=1e-12, abs=1e-12)


def test_first_max_takes_the_lowest_of_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (1, 3, 8, 17, 1000, 40_001):
        values = torch.randint(0, 3, (20, width), generator=generator).float()
        best, columns = first_max(values)
        expected = values.numpy().argmax(-1)
        assert columns.tolist() == expected.tolist()
        assert torch.equal(best, values.amax(-1))
    values = torch.full((2, 100_000), -math.inf)
    values[:, 4000:] = 1.5
    assert first_max(values)[1].tolist() == [4000, 4000]
