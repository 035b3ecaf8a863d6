"""Sampling inside a graph draws the tokens that the CPU's sampler draws."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from phalanx.kernels.gpu import sampling
from phalanx.kernels.gpu.conversion import INTERPRETED
from phalanx.workers.sampling import threshold
from phalanx.workers.sampling.random import first_max, gumbel, gumbel_max, stream_key, token_bits
from phalanx.workers.sampling.threshold import order_keys

pytestmark = [] if INTERPRETED else pytest.mark.gpu

SEEDS = [0, 1, 2**63 + 5, 2**64 - 1]


def _streams(
    position: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stems, positions, the CPU's keys) of `SEEDS`."""
    stems = [sampling.stem(seed, index) for index, seed in enumerate(SEEDS)]
    keys = [stream_key(seed, index, position) for index, seed in enumerate(SEEDS)]
    positions = torch.full((len(SEEDS),), position, device=device)
    return torch.tensor(stems, device=device), positions, torch.tensor(keys)


@pytest.mark.parametrize(
    ("width", "first_id", "dtype"),
    [(1, 0, torch.bfloat16), (515, 60_000, torch.float32), (2500, 0, torch.bfloat16)],
)
def test_the_winner_and_its_value(
    width: int, first_id: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(width)
    logits = (torch.randn(4, width, device=device) * 3).to(dtype)
    temperatures = torch.tensor([1.0, 0.3, 40.0, 0.0], dtype=torch.float64, device=device)
    stems, positions, keys = _streams(117, device)
    got = sampling.sample(logits, temperatures, stems, positions, first_id).cpu()
    wide = logits.float().cpu()
    values, columns = gumbel_max(wide[:3], temperatures[:3].cpu(), keys[:3], first_id)
    greedy, column = first_max(wide[3:])
    columns = torch.cat([columns, column])
    assert got[:, 0].tolist() == (columns + first_id).tolist()
    torch.testing.assert_close(got[:3, 1], values, rtol=1e-14, atol=1e-13)
    assert got[3, 1] == greedy[0]
    assert torch.equal(got[:, 2], wide.gather(1, columns[:, None])[:, 0].double())
    assert not got[:, 3].any()


def test_the_noise_has_the_same_bits(device: torch.device) -> None:
    """One token a row, logit 0 and temperature 1: the value is the noise."""
    for position in (0, 1, 2**20):
        stems, positions, keys = _streams(position, device)
        for token in (0, 1, 128_255):
            zeros, ones = torch.zeros(4, 1, device=device), torch.ones(4, device=device)
            got = sampling.sample(zeros, ones.double(), stems, positions, token)
            expected = gumbel(token_bits(keys, torch.tensor(token)))
            torch.testing.assert_close(got[:, 1].cpu(), expected, rtol=1e-14, atol=1e-15)


def test_ties_go_to_the_lowest_id_within_and_across_chunks(device: torch.device) -> None:
    logits = torch.zeros(2, 3000, device=device)
    logits[0, 1500:] = 2.0
    logits[1, [7, 2999]] = 1.0
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    got = sampling.sample(logits, zeros.double(), zeros, zeros, 10)
    assert got[:, 0].tolist() == [1510, 17]


def test_rows_with_nan_or_infinite_logits_are_marked(device: torch.device) -> None:
    logits = torch.zeros(4, 2000, device=device)
    logits[0, 1999], logits[1, 3], logits[2, 1200] = math.nan, math.inf, -math.inf
    logits[3, 5] = 1.0
    stems, positions, _ = _streams(0, device)
    got = sampling.sample(logits, torch.zeros_like(stems).double(), stems, positions, 0)
    assert got[:, 3].tolist() == [1, 1, 1, 0]
    assert got[3, 0] == 5


@pytest.mark.parametrize("cuts", [[0, 700], [0, 1, 350, 350, 700]])
def test_ranks_with_a_slice_each_agree_with_one(cuts: list[int], device: torch.device) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 700, device=device)
    logits[3] = 0
    temperatures = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64, device=device)
    stems, positions, _ = _streams(9, device)
    whole = sampling.sample(logits, temperatures, stems, positions, 0)
    parts = [
        sampling.sample(logits[:, start:stop], temperatures, stems, positions, start)
        for start, stop in pairwise(cuts)
    ]
    tokens = torch.empty(4, dtype=torch.int64, device=device)
    assert torch.equal(sampling.merge(torch.stack(parts), tokens), whole)
    assert tokens.tolist() == whole[:, 0].tolist()


@pytest.mark.parametrize("step", [1, 1 << 20, 1 << 28])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_above_thresholds(step: int, weighted: bool, device: torch.device) -> None:
    torch.manual_seed(step % 7)
    logits = torch.randn(3, 1300, device=device) * 4
    logits[1] = logits[1].round()
    logits[2, :5] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38])
    tops = logits.double().amax(1)
    warmth = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64, device=device)
    lowest = order_keys(logits)[:, 7] - 5 * step
    got, expected = (
        run(logits, tops, warmth, lowest, step, weighted=weighted)
        for run in (sampling.tail_sums, threshold.tail_sums)
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert len(got.unique()) > 3
