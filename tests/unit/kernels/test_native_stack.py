"""A whole stack in one call, against the same layers composed from the reference in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from phalanx.kernels.cpu.library import library_path
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.fused import PeerLost, PlainLayer, PlainStack, Reduction, SharedSegment
from phalanx.kernels.int8 import to_pool
from phalanx.kernels.interface import AttentionSpec, SequenceSpan
from phalanx.kernels.reference import ReferenceBackend

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)

HIDDEN, HEADS, KV_HEADS, DIM, INNER, LAYERS, BLOCK = 24, 4, 2, 10, 51, 3, 4
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 6e-2}
SPANS = [SequenceSpan(0, 1, 11, [3, 9, 1]), SequenceSpan(1, 6, 8, [0, 5])]
TOKENS = 7
SLOTS = torch.tensor([6, 2, 3, 20, 21, 22, 23])
ROWS = torch.tensor([6, 0])


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class Layer:
    """One rank's weights of a layer."""

    norms: list[Tensor]
    linears: list[tuple[Tensor, Tensor | None]]
    pools: Tensor
    head_norms: tuple[Tensor, Tensor] | tuple[None, None]
    spec: AttentionSpec


def make_layers(dtype: torch.dtype, rank: int, head_norms: bool) -> list[Layer]:
    layers = []
    rows = (HEADS + 2 * KV_HEADS) * DIM
    shapes = [(rows, HIDDEN), (HIDDEN, HEADS * DIM), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
    for index in range(LAYERS):
        seed = 100 * index + 1000 * rank
        linears: list[tuple[Tensor, Tensor | None]] = []
        for part, shape in enumerate(shapes):
            bias = randn(shape[0], seed=seed + part + 10, dtype=dtype) if index else None
            linears.append((randn(*shape, seed=seed + part, dtype=dtype) * 0.2, bias))
        pools = randn(2, KV_HEADS, 12, BLOCK, DIM, seed=seed + 20, dtype=dtype)
        norm = [randn(HIDDEN, seed=index + part, dtype=dtype) * 0.1 for part in (0, 1)]
        heads = (randn(DIM, seed=7, dtype=dtype), randn(DIM, seed=8, dtype=dtype))
        sinks = randn(HEADS, seed=70, dtype=torch.float32) if index == 1 else None
        spec = AttentionSpec(scale=0.3, window=5 if index == 1 else 0, sinks=sinks)
        layers.append(Layer(norm, linears, pools, heads if head_norms else (None, None), spec))
    return layers


def composed(
    ranks: list[list[Layer]], x: Tensor, cos: Tensor, sin: Tensor, int8: bool = False
) -> Tensor:
    """Every step as its own operation in float64, the ranks' parts summed.

    int8: of linear layers and pools.
    """
    backend = ReferenceBackend()
    hidden, cos, sin = x.double(), cos.double(), sin.double()
    plan = backend.plan_attention(SPANS, BLOCK)
    for index in range(LAYERS):
        layers = [rank[index] for rank in ranks]
        normed = backend.rms_norm(hidden, layers[0].norms[0].double(), 1e-5, 1.0)
        total = torch.zeros_like(hidden)
        for layer in layers:
            (qkv, output), pools = layer.linears[:2], layer.pools.double()
            pools = to_pool(pools, torch.int8) if int8 else pools
            heads = apply(qkv, normed, int8).view(TOKENS, -1, DIM)
            query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            if layer.head_norms[0] is not None and layer.head_norms[1] is not None:
                query = backend.rms_norm(query, layer.head_norms[0].double(), 1e-5, 1.0)
                key = backend.rms_norm(key, layer.head_norms[1].double(), 1e-5, 1.0)
            query, key = backend.rope(query, cos, sin), backend.rope(key, cos, sin)
            backend.store_kv(key, value, pools[0], pools[1], SLOTS)
            mixed = backend.paged_attention(query, pools[0], pools[1], plan, layer.spec)
            total += apply(output, mixed.flatten(1), int8)
        hidden = hidden + total
        normed = backend.rms_norm(hidden, layers[0].norms[1].double(), 1e-5, 1.0)
        for layer in layers:
            gate_up, down = layer.linears[2:]
            activated = backend.silu_mul(apply(gate_up, normed, int8))
            hidden = hidden + apply(down, activated, int8)
    return backend.rms_norm(hidden, ranks[0][0].norms[0].double(), 1e-5, 1.0)[ROWS]


def apply(linear: tuple[Tensor, Tensor | None], x: Tensor, int8: bool = False) -> Tensor:
    weight, bias = linear
    if int8:
        return ReferenceBackend().pack_linear_int8(weight, bias)(x)
    return torch.nn.functional.linear(x, weight.double(), None if bias is None else bias.double())


def program(
    layers: list[Layer],
    reduction: Reduction,
    threads: int,
    final_norm: Tensor | None,
    int8: bool = False,
) -> Any:
    """The layers as one call; without a final norm, of all rows."""
    backend = NativeBackend(threads=threads)
    pack = backend.pack_linear_int8 if int8 else backend.pack_linear
    pool_dtype = torch.int8 if int8 else layers[0].pools.dtype
    plain = [
        PlainLayer(
            input_norm=layer.norms[0],
            qkv=pack(*layer.linears[0]),
            attention=layer.spec,
            output=pack(*layer.linears[1]),
            post_norm=layer.norms[1],
            gate_up=pack(*layer.linears[2]),
            down=pack(*layer.linears[3]),
            key_pool=to_pool(layer.pools[0], pool_dtype).clone(),
            value_pool=to_pool(layer.pools[1], pool_dtype).clone(),
            query_norm=layer.head_norms[0],
            key_norm=layer.head_norms[1],
        )
        for layer in layers
    ]
    stack = PlainStack(
        layers=plain,
        final_norm=final_norm,
        norm_eps=1e-5,
        norm_offset=1.0,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        intermediate_size=INNER,
    )
    ready = backend.fuse(stack, reduction)
    assert ready is not None
    plan = backend.plan_attention(SPANS, BLOCK)
    rows = torch.arange(TOKENS) if final_norm is None else ROWS
    return lambda x, cos, sin: ready(x, cos, sin, SLOTS, plan, rows)


def whole(layers: list[Layer], reduction: Reduction, threads: int) -> Any:
    return program(layers, reduction, threads, layers[0].norms[0])


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    angles = randn(TOKENS, DIM // 2 - 1, seed=5, dtype=torch.float32)
    return (
        randn(TOKENS, HIDDEN, seed=4, dtype=dtype),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
    )


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_rank_equals_the_composed_layers(
    dtype: torch.dtype, head_norms: bool, threads: int
) -> None:
    layers = make_layers(dtype, 0, head_norms)
    run = whole(layers, Reduction(), threads)
    x, cos, sin = inputs(dtype)
    expected, limit = composed([layers], x, cos, sin), TOLERANCE[dtype]
    for _ in range(2):  # the second run writes the same keys and values again
        torch.testing.assert_close(run(x, cos, sin).double(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 2])
def test_stacks_that_follow_one_another_give_the_bits_of_one(dtype: torch.dtype, cut: int) -> None:
    layers = make_layers(dtype, 0, True)
    norm = layers[0].norms[0]
    first = program(layers[:cut], Reduction(), 2, None)
    second = program(layers[cut:], Reduction(), 1, norm)
    x, cos, sin = inputs(dtype)
    between = first(x, cos, sin)
    assert between.dtype is torch.float32 and between.shape == x.shape
    result = second(between, cos, sin)
    assert result.dtype is dtype
    assert torch.equal(result, program(layers, Reduction(), 2, norm)(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_norms", [False, True])
def test_int8_weights_and_pools_equal_the_composed_layers(
    dtype: torch.dtype, head_norms: bool
) -> None:
    """A level more or less, where a number lies between two, is all that may differ."""
    layers = make_layers(dtype, 0, head_norms)
    x, cos, sin = inputs(dtype)
    expected = composed([layers], x, cos, sin, int8=True)
    one, three = (
        program(layers, Reduction(), threads, layers[0].norms[0], int8=True) for threads in (1, 3)
    )
    got = one(x, cos, sin)
    assert torch.equal(got, three(x, cos, sin))
    difference = (got.double() - expected).norm() / expected.norm()
    assert difference < (0.01 if dtype is torch.float32 else 0.03)
    exact = composed([layers], x, cos, sin)
    assert (got.double() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("slot_bytes", [64, 4096])  # the sums go in pieces, or at once
def test_ranks_that_share_memory_get_the_same_sums(size: int, slot_bytes: int) -> None:
    dtype = torch.float32
    ranks = [make_layers(dtype, rank, False) for rank in range(size)]
    memory, shared = segments(size, slot_bytes, timeout_s=60)
    x, cos, sin = inputs(dtype)
    runs = [whole(ranks[r], Reduction(segment=shared[r]), threads=1 + r % 2) for r in range(size)]
    results = in_threads(size, lambda rank: runs[rank](x, cos, sin))
    assert all(torch.equal(result, results[0]) for result in results)
    expected = composed(ranks, x, cos, sin)
    torch.testing.assert_close(results[0].double(), expected, atol=3e-5, rtol=3e-5)
    del memory

    barrier, parts = threading.Barrier(size), [torch.empty(0)] * size

    def by_function(rank: int) -> Callable[[Tensor], Tensor]:
        def total(part: Tensor) -> Tensor:
            parts[rank] = part
            barrier.wait(60)
            result = parts[0].clone()
            for other in parts[1:]:
                result += other
            barrier.wait(60)
            return result

        return total

    runs = [whole(ranks[r], Reduction(function=by_function(r)), 1) for r in range(size)]
    again = in_threads(size, lambda rank: runs[rank](x, cos, sin))
    assert all(torch.equal(result, results[0]) for result in again)


def test_a_rank_that_does_not_come_is_named() -> None:
    memory, shared = segments(2, 4096, timeout_s=0.05)
    run = whole(make_layers(torch.float32, 0, False), Reduction(segment=shared[0]), 2)
    with pytest.raises(PeerLost) as caught:
        run(*inputs(torch.float32))
    assert caught.value.rank == 1
    del memory
