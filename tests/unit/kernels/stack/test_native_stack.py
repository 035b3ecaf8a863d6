"""A whole stack in one call, against the same layers composed from the reference in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.cpu.library import ACTIVATIONS, library_path
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.fused import HeadWidth, PeerLost, Reduction, SharedSegment

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-2}
BLOCKS = ("pre", "sandwich", "post", "parallel", "parallel_two")
HEADED = {"head_norm": "head"}
Fields = dict[str, Any]


def in_threads(count: int, work: Callable[[int], Tensor]) -> list[Tensor]:
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        results[index] = work(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def segments(
    size: int, slot_bytes: int, timeout_s: float
) -> tuple[np.ndarray, list[SharedSegment]]:
    memory = np.zeros(size * 64 + 2 * size * slot_bytes + 64, dtype=np.uint8)
    address = -(-memory.ctypes.data // 64) * 64
    return memory, [SharedSegment(address, r, size, slot_bytes, timeout_s) for r in range(size)]


def by_function(size: int) -> list[Reduction]:
    """Sums in rank order, by Python."""
    barrier, parts = threading.Barrier(size), [torch.empty(0)] * size

    def of(rank: int) -> Callable[[Tensor], Tensor]:
        def total(part: Tensor) -> Tensor:
            parts[rank] = part
            barrier.wait(60)
            result = parts[0].clone()
            for other in parts[1:]:
                result += other
            barrier.wait(60)
            return result

        return total

    return [Reduction(function=of(rank)) for rank in range(size)]


@st.composite
def kinds(draw: st.DrawFn) -> Fields:
    layer = draw(st.booleans())
    return {
        "block": draw(st.sampled_from(BLOCKS)),
        "norm": "layer" if layer else "rms",
        "norm_bias": layer and draw(st.booleans()),
        "affine": not layer or draw(st.booleans()),
        "offset": draw(st.sampled_from([0.0, 1.0])),
        "gated": draw(st.booleans()),
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "head_norm": draw(st.sampled_from(["none", "head", "each", "width"])),
        "rotations": draw(st.sampled_from([(0, 0, 0), (None, None, None), (1, None, 0)])),
        "clip": draw(st.sampled_from([0.0, 0.7])),
        "residual_scale": draw(st.sampled_from([1.0, 0.4])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "alibi": draw(st.booleans()),
        "hidden": draw(st.sampled_from([24, 55])),
        "inner": draw(st.sampled_from([51, 32])),
        "dim": draw(st.sampled_from([10, 11])),
    }


@settings(max_examples=30, deadline=None)
@given(fields=kinds(), size=st.integers(1, 3), dtype=st.sampled_from(list(TOLERANCE)))
def test_every_kind_of_layer_equals_the_composed_one(
    stacks: Any, fields: Fields, size: int, dtype: torch.dtype
) -> None:
    """Any combination of what layers may be, of odd sizes, on ranks with unlike numbers of heads."""
    kind = stacks.kind(**fields)
    heads = [(4, 2), (3, 1), (2, 1)][:size]
    ranks = [stacks.part(dtype, kind, rank, *heads[rank]) for rank in range(size)]
    x, angles = stacks.inputs(dtype, kind)
    expected = stacks.composed(ranks, x, angles)
    total = sum(query for query, _ in heads), sum(kv for _, kv in heads)
    width = HeadWidth(total[0] * kind.dim, total[1] * kind.dim, True)
    memory, parts = segments(size, 256, timeout_s=60)
    limit = TOLERANCE[dtype] * (1 if dtype is torch.float32 else 2)
    results = []
    for reductions in ([Reduction(segment=each) for each in parts], by_function(size)):
        if size == 1:
            reductions = [Reduction()]
        runs = [
            stacks.program(ranks[r], reductions[r], NativeBackend(1 + r % 2), width=width)
            for r in range(size)
        ]
        got = in_threads(size, lambda rank, runs=runs: runs[rank](x, angles))
        assert all(torch.equal(each, got[0]) for each in got)
        results.append(got[0])
    torch.testing.assert_close(results[0].double(), expected, atol=limit, rtol=limit)
    assert torch.equal(*results)
    del memory


def test_keys_that_ranks_share_are_counted_once(stacks: Any) -> None:
    kind = stacks.kind(head_norm="width")
    ranks = [stacks.part(torch.float32, kind, rank, 2, 1) for rank in (0, 1)]
    for layer, other in zip(ranks[0].layers, ranks[1].layers, strict=True):
        keys = slice(2 * kind.dim, 3 * kind.dim)
        for mine, theirs in zip(layer.linears[0], other.linears[0], strict=True):
            if mine is not None and theirs is not None:
                theirs[keys] = mine[keys]
        other.head_norms = (other.head_norms[0], layer.head_norms[1])  # type: ignore[assignment]
    x, angles = stacks.inputs(torch.float32, kind)
    runs = [
        stacks.program(
            ranks[rank],
            reduction,
            NativeBackend(1),
            width=HeadWidth(4 * kind.dim, kind.dim, counts_keys=rank == 0),
        )
        for rank, reduction in enumerate(by_function(2))
    ]
    got = in_threads(2, lambda rank: runs[rank](x, angles))[0]
    # the mean over both copies of the keys is that over one
    expected = stacks.composed(ranks, x, angles)
    torch.testing.assert_close(got.double(), expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        HEADED,
        {"norm": "layer", "norm_bias": True, "gated": False, "activation": "gelu", "hidden": 55},
        {"dim": 32, "block_size": 16},  # pools that are arranged as panels, where they are bfloat16
    ],
)
def test_every_instruction_set_equals_the_composed_layers(
    stacks: Any, native: NativeBackend, dtype: torch.dtype, fields: Fields
) -> None:
    kind = stacks.kind(**fields)
    part = stacks.part(dtype, kind)
    run = stacks.program(part, Reduction(), native)
    x, angles = stacks.inputs(dtype, kind)
    expected, limit = stacks.composed([part], x, angles), TOLERANCE[dtype]
    for _ in range(2):  # the second run writes the same keys and values again
        torch.testing.assert_close(run(x, angles).double(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("block", BLOCKS)
def test_stacks_that_follow_one_another_give_the_bits_of_one(
    stacks: Any, dtype: torch.dtype, cut: int, block: str
) -> None:
    part = stacks.part(dtype, stacks.kind(**HEADED, block=block, residual_scale=0.7))
    first = stacks.program(part, Reduction(), NativeBackend(2), layers=slice(cut), ends=False)
    second = stacks.program(part, Reduction(), NativeBackend(1), layers=slice(cut, None))
    x, angles = stacks.inputs(dtype)
    between = first(x, angles)
    assert between.dtype is torch.float32 and between.shape == x.shape
    result = second(between, angles)
    assert result.dtype is dtype
    assert torch.equal(result, stacks.program(part, Reduction(), NativeBackend(2))(x, angles))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        HEADED,
        {"block": "parallel_two", "norm": "layer", "norm_bias": True, "hidden": 55},
        {"block": "sandwich", "head_norm": "each", "gated": False, "activation": "gelu", "dim": 11},
        {"block": "parallel", "norm": "layer", "gated": False, "activation": "gelu_tanh"},
        {"block": "post", "head_norm": "width"},
        {"dim": 32, "block_size": 16},  # pools that are arranged as panels, where all is bfloat16
    ],
)
def test_int8_weights_and_pools_equal_the_composed_layers(
    stacks: Any, dtype: torch.dtype, fields: Fields
) -> None:
    """A level more or less, where a number lies between two, is all that may differ."""
    kind = stacks.kind(**fields)
    part = stacks.part(dtype, kind)
    x, angles = stacks.inputs(dtype, kind)
    width = HeadWidth(4 * kind.dim, 2 * kind.dim, True)
    expected = stacks.composed([part], x, angles, int8=True)
    one, three = (
        stacks.program(part, Reduction(), NativeBackend(threads), int8=True, width=width)
        for threads in (1, 3)
    )
    got = one(x, angles)
    assert torch.equal(got, three(x, angles))
    difference = (got.double() - expected).norm() / expected.norm()
    assert difference < (0.01 if dtype is torch.float32 else 0.03)
    exact = stacks.composed([part], x, angles)
    assert (got.double() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("slot_bytes", [64, 4096])  # the sums go in pieces, or at once
def test_sums_go_through_memory_of_any_size(stacks: Any, slot_bytes: int) -> None:
    ranks = [stacks.part(torch.float32, stacks.kind(), rank) for rank in (0, 1, 2)]
    memory, shared = segments(3, slot_bytes, timeout_s=60)
    x, angles = stacks.inputs(torch.float32)
    runs = [
        stacks.program(ranks[r], Reduction(segment=shared[r]), NativeBackend(1 + r % 2))
        for r in range(3)
    ]
    results = in_threads(3, lambda rank: runs[rank](x, angles))
    assert all(torch.equal(result, results[0]) for result in results)
    expected = stacks.composed(ranks, x, angles)
    torch.testing.assert_close(results[0].double(), expected, atol=3e-5, rtol=3e-5)
    del memory


def test_a_rank_that_does_not_come_is_named(stacks: Any) -> None:
    memory, shared = segments(2, 4096, timeout_s=0.05)
    run = stacks.program(stacks.part(torch.float32), Reduction(segment=shared[0]), NativeBackend(2))
    with pytest.raises(PeerLost) as caught:
        run(*stacks.inputs(torch.float32))
    assert caught.value.rank == 1
    del memory
