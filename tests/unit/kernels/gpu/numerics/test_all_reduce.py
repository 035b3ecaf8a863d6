"""The sum over ranks with residual and norm: plain buffers stand for the peers' memory."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.kernels.float8 import Float8Rows, quantize
from phalanx.kernels.fused import PeerBuffers
from phalanx.kernels.gpu import all_reduce
from phalanx.kernels.gpu.all_reduce import (
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_quantize,
)
from phalanx.kernels.gpu.conversion import INTERPRETED

pytestmark = [] if INTERPRETED else pytest.mark.gpu


def _expected(parts: list[Tensor], residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = residual.dtype
    total = torch.zeros_like(residual, dtype=torch.float32)
    for part in parts:
        total += part.float()
    summed = total.to(dtype) + residual
    wide = summed.double()
    scale = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return wide * scale * weight.double(), summed


def _equal_rows(got: Float8Rows, expected: tuple[Tensor, Tensor]) -> None:
    """Scales are equal; the interpreter rounds the smallest levels otherwise, by less than 2**-9."""
    torch.testing.assert_close(got.scales, expected[1])
    torch.testing.assert_close(got.levels.float(), expected[0].float(), rtol=0.13, atol=2**-9)


@pytest.mark.parametrize(
    ("size", "rows", "n", "dtype"),
    [
        (1, 2, 576, torch.float32),
        (2, 66, 64, torch.bfloat16),
        (3, 5, 100, torch.float32),
        (8, 1, 576, torch.bfloat16),
    ],
)
def test_every_rank_gets_the_same_sum_and_norm(
    size: int, rows: int, n: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(size)
    buffers = [torch.randn(rows + 2, n, device=device).to(dtype) for _ in range(size)]
    residual, weight = torch.randn(rows, n, device=device).to(dtype), torch.randn(n, device=device)
    weight = weight.to(dtype)
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    expected, summed = _expected([buffer[:rows] for buffer in buffers], residual, weight)
    results = []
    for rank in range(size):
        own = residual.clone()
        peers = PeerBuffers(rank, buffers[rank], addresses, None)
        results.append(all_reduce_add_rms_norm(peers, own, weight, 1e-5))
        assert torch.equal(own, summed)
        assert torch.equal(results[rank], results[0])
    rounded = all_reduce_add_rms_norm_quantize(peers, residual.clone(), weight, 1e-5)
    _equal_rows(rounded, quantize(results[0]))
    tolerance = 2e-6 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(results[0].double(), expected, rtol=tolerance, atol=tolerance)


def _rank(rank: int, buffers: Tensor, pads: Tensor, start: Any, queue: Any) -> None:
    """A process: four sums, on two buffers in turn. The last rank writes when the others wait."""
    torch.set_num_threads(1)
    size, _, rows, n = buffers.shape
    residual, weight = torch.zeros(rows, n), torch.ones(n)
    signals = torch.tensor([pads[peer].data_ptr() for peer in range(size)])
    start.wait()
    sums = []
    for turn in range(4):
        mine = buffers[rank, turn % 2]
        while rank == size - 1 and not pads[rank].any():
            pass
        mine.fill_(float(10**turn * (rank + 1)))
        addresses = torch.tensor([buffers[peer, turn % 2].data_ptr() for peer in range(size)])
        own = residual.clone()
        all_reduce_add_rms_norm(PeerBuffers(rank, mine, addresses, signals), own, weight, 1e-5)
        sums.append(own.unique().tolist())
    queue.put((rank, sums))


@pytest.mark.skipif(not INTERPRETED, reason="processes share no device memory by themselves")
def test_ranks_wait_for_each_other_before_they_read() -> None:
    """The real barrier, by processes: the interpreter's atomics are those of the machine."""
    size, rows = 2, 3
    context = multiprocessing.get_context("fork")
    buffers = torch.zeros(size, 2, rows, 8).share_memory_()
    pads = torch.zeros(size, all_reduce.PROGRAMS * size, dtype=torch.int32).share_memory_()
    start, queue = context.Barrier(size), context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, buffers, pads, start, queue), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        results = dict(queue.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.kill()
    assert results == {rank: [[3.0], [30.0], [300.0], [3000.0]] for rank in range(size)}
    assert not pads.any()
