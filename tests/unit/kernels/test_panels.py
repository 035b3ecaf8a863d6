"""KV pools in panels: what is stored is found again, and attention has the bits of a plain pool."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.cpu.library import library_path
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.cpu.panels import from_panels, in_panels
from phalanx.kernels.interface import AttentionSpec, SequenceSpan

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)


def open_backends() -> dict[str, NativeBackend]:
    backends = {}
    for isa in ("plain", "avx2", "avx512", "avx512_bf16"):
        try:
            backends[isa] = NativeBackend(threads=2, isa=isa)
        except OSError:
            continue  # this processor has no such instructions
    return backends


BACKENDS = open_backends()
LENGTH = 700  # tokens that the pools hold


def pools(kv_heads: int, block_size: int, dim: int) -> Tensor:
    """Whatever was there before: not a number."""
    blocks = -(-LENGTH // block_size)
    return torch.full((2, kv_heads, blocks, block_size, dim), torch.nan).bfloat16()


def heads(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(list(BACKENDS)),
    block_size=st.sampled_from([16, 32, 64, 128, 48]),
    dim=st.sampled_from([32, 64, 96, 128]),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 5, 9, 13, 40]),
    lengths=st.lists(st.tuples(st.integers(1, LENGTH), st.integers(1, 70)), min_size=1, max_size=3),
    window=st.sampled_from([0, 9, 200]),
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_attention_has_the_bits_of_a_plain_pool(
    isa: str,
    block_size: int,
    dim: int,
    kv_heads: int,
    group: int,
    lengths: list[tuple[int, int]],
    window: int,
    softcap: float,
    seed: int,
) -> None:
    backend = BACKENDS[isa]
    plain = pools(kv_heads, block_size, dim)
    panels = backend.arrange_pools(*plain.clone(), torch.bfloat16)
    assert all(map(in_panels, panels))
    longest = max(length for length, _ in lengths)
    order = torch.randperm(plain.shape[2], generator=torch.Generator().manual_seed(seed))
    places = torch.arange(longest)
    slots = order[places // block_size] * block_size + places % block_size
    key, value = heads(2, longest, kv_heads, dim, seed=seed)
    for each in (plain, panels):
        backend.store_kv(key, value, each[0], each[1], slots)
    spans, start = [], 0
    for length, queries in lengths:
        count = min(queries, length)
        spans.append(SequenceSpan(start, count, length, order.tolist()))
        start += count
    query = heads(start, kv_heads * group, dim, seed=seed + 1)
    plan = backend.plan_attention(spans, block_size)
    spec = AttentionSpec(scale=dim**-0.5, window=window, softcap=softcap)
    expected = backend.paged_attention(query, plain[0], plain[1], plan, spec)
    assert not expected.isnan().any()
    assert torch.equal(backend.paged_attention(query, *panels, plan, spec), expected)


def test_what_is_stored_is_found_again_whatever_stands_beside_it() -> None:
    backend, slots = NativeBackend(threads=2), torch.tensor([33, 2, 3, 47, 16])
    plain = pools(2, 16, 64)
    panels = backend.arrange_pools(*plain.clone(), torch.bfloat16)
    strided = heads(5, 2, 128, seed=3)[:, :, :64]  # as a projection may leave them
    value = heads(5, 2, 64, seed=4)
    backend.store_kv(strided, value, *panels, slots)
    for found, stored in zip(from_panels(*panels), (strided, value), strict=True):
        flat = found.flatten(1, 2)
        assert torch.equal(flat[:, slots].transpose(0, 1), stored)
        assert flat.isnan().all(-1).sum() == 2 * (flat.shape[1] - 5)


@pytest.mark.parametrize(
    ("block_size", "dim", "dtype"),
    [(8, 64, torch.bfloat16), (16, 80, torch.bfloat16), (16, 64, torch.float32)],
)
def test_pools_of_other_shapes_stay_as_they_are(
    block_size: int, dim: int, dtype: torch.dtype
) -> None:
    plain = pools(1, block_size, dim).to(dtype)
    assert not any(map(in_panels, NativeBackend().arrange_pools(*plain, dtype)))


def test_groups_that_the_library_refuses_are_computed_all_the_same() -> None:
    backend = NativeBackend()
    plain = pools(1, 16, 32).nan_to_num()
    panels = backend.arrange_pools(*plain.clone(), torch.bfloat16)
    key, value = heads(2, 40, 1, 32, seed=1)
    for each in (plain, panels):
        backend.store_kv(key, value, each[0], each[1], torch.arange(40))
    query = heads(1, 300, 32, seed=2)
    plan = backend.plan_attention([SequenceSpan(0, 1, 40, [0, 1, 2])], 16)
    spec = AttentionSpec(scale=0.2)
    expected = backend.paged_attention(query, plain[0], plain[1], plan, spec)
    assert torch.equal(backend.paged_attention(query, *panels, plan, spec), expected)
