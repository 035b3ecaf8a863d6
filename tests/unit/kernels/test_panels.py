"""KV pools in panels: what is stored is found again, and attended to as in a plain pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.cpu.library import library_path
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.cpu.panels import from_panels, in_panels
from phalanx.kernels.int8 import from_pool, to_pool
from phalanx.kernels.interface import AttentionSpec, SequenceSpan
from phalanx.kernels.reference import weigh

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)


LENGTH = 700  # tokens that the pools hold


def pools(kv_heads: int, block_size: int, dim: int) -> Tensor:
    """Whatever was there before: not a number."""
    blocks = -(-LENGTH // block_size)
    return torch.full((2, kv_heads, blocks, block_size, dim), torch.nan).bfloat16()


def byte_pools(kv_heads: int, block_size: int, dim: int) -> Tensor:
    """The same in int8: scales of such bytes are no numbers."""
    return torch.full_like(to_pool(pools(kv_heads, block_size, dim), torch.int8), -1)


def heads(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@dataclass(frozen=True)
class Case:
    """A step's attention: sequences as (length, queries), their blocks scattered alike."""

    block_size: int
    dim: int
    kv_heads: int
    group: int
    lengths: list[tuple[int, int]]
    spec: AttentionSpec
    seed: int

    @property
    def order(self) -> list[int]:
        blocks = -(-LENGTH // self.block_size)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(blocks, generator=generator).tolist()

    @property
    def spans(self) -> list[SequenceSpan]:
        spans, start = [], 0
        for length, queries in self.lengths:
            count = min(queries, length)
            spans.append(SequenceSpan(start, count, length, self.order))
            start += count
        return spans

    @property
    def query(self) -> Tensor:
        tokens = sum(span.num_query for span in self.spans)
        return heads(tokens, self.kv_heads * self.group, self.dim, seed=self.seed + 1)

    def store(self, backend: NativeBackend, pools: tuple[Tensor, Tensor]) -> None:
        places = torch.arange(max(length for length, _ in self.lengths))
        slots = torch.tensor(self.order)[places // self.block_size] * self.block_size
        shape = (2, len(places), self.kv_heads, self.dim)
        key, value = heads(*shape, seed=self.seed)
        backend.store_kv(key, value, *pools, slots + places % self.block_size)

    def attend(self, backend: NativeBackend, pools: tuple[Tensor, Tensor]) -> Tensor:
        plan = backend.plan_attention(self.spans, self.block_size)
        return backend.paged_attention(self.query, *pools, plan, self.spec)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dim = draw(st.sampled_from([32, 64, 96, 128]))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 5, 9, 13, 40]))
    pair = st.tuples(st.integers(1, LENGTH), st.integers(1, 70))
    slopes = heads(kv_heads * group, seed=3).float().abs()
    return Case(
        block_size=draw(st.sampled_from([16, 32, 64, 128, 48])),
        dim=dim,
        kv_heads=kv_heads,
        group=group,
        lengths=draw(st.lists(pair, min_size=1, max_size=3)),
        spec=AttentionSpec(
            scale=dim**-0.5,
            window=draw(st.sampled_from([0, 9, 200])),
            softcap=draw(st.sampled_from([0.0, 2.0])),
            alibi_slopes=draw(st.sampled_from([None, slopes])),
            sinks=draw(st.sampled_from([None, slopes * 3])),
        ),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_attention_has_the_bits_of_a_plain_pool(native: NativeBackend, case: Case) -> None:
    plain = pools(case.kv_heads, case.block_size, case.dim)
    panels = native.arrange_pools(*plain.clone(), torch.bfloat16)
    assert all(map(in_panels, panels))
    for each in (plain.unbind(), panels):
        case.store(native, each)
    expected = case.attend(native, plain.unbind())
    assert not expected.isnan().any()
    assert torch.equal(case.attend(native, panels), expected)


@settings(max_examples=10, deadline=None)
@given(case=cases())
def test_attention_to_bytes_equals_dense_attention_in_float64(
    native: NativeBackend, case: Case
) -> None:
    """To a part of bfloat16's rounding: queries and weights are whole numbers of 16 bits."""
    plain = byte_pools(case.kv_heads, case.block_size, case.dim)
    panels = native.arrange_pools(*plain.clone(), torch.bfloat16)
    assert all(map(in_panels, panels))
    case.store(native, panels)
    got, order = case.attend(native, panels), case.order
    for span in case.spans:
        rows = slice(span.start, span.start + span.num_query)
        flat = [from_pool(pool[:, order].flatten(1, 2)) for pool in from_panels(*panels)]
        keys, values = (each[:, : span.length].double() for each in flat)
        keys, values = (each.repeat_interleave(case.group, dim=0) for each in (keys, values))
        distance = torch.arange(span.length) - torch.arange(span.length)[-span.num_query :, None]
        scores = case.query[rows].transpose(0, 1).double() @ keys.transpose(1, 2)
        expected = (weigh(scores, distance, case.spec) @ values).transpose(0, 1)
        # what is left is the rounding of the outputs to bfloat16
        torch.testing.assert_close(got[rows].double(), expected, atol=1e-3, rtol=2**-8)


@settings(max_examples=6, deadline=None)
@given(case=cases(), chunk=st.sampled_from([1, 7, 40]))
def test_attention_to_bytes_has_the_same_bits_however_the_prompt_is_cut(
    native: NativeBackend, case: Case, chunk: int
) -> None:
    panels = native.arrange_pools(
        *byte_pools(case.kv_heads, case.block_size, case.dim), torch.bfloat16
    )
    case.store(native, panels)
    together = case.attend(native, panels)
    for span in case.spans:
        for first in range(0, span.num_query, chunk):
            count = min(chunk, span.num_query - first)
            length = span.length - span.num_query + first + count
            rows = slice(span.start + first, span.start + first + count)
            plan = native.plan_attention(
                [SequenceSpan(0, count, length, span.blocks)], case.block_size
            )
            part = native.paged_attention(case.query[rows], *panels, plan, case.spec)
            assert torch.equal(part, together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_found_again_whatever_stands_beside_them(
    native: NativeBackend, dtype: torch.dtype
) -> None:
    slots = torch.tensor([33, 2, 3, 47, 16])
    plain = byte_pools(2, 16, 64)
    panels = native.arrange_pools(*plain.clone(), torch.bfloat16)
    key, value = heads(2, 5, 2, 64, seed=3).to(dtype)
    key[2, 1, 5] = torch.inf
    native.store_kv(key, value, *panels, slots)
    for found, stored in zip(from_panels(*panels), (key, value), strict=True):
        flat = found.flatten(1, 2)
        rows = from_pool(flat[:, slots]).transpose(0, 1)
        expected = from_pool(to_pool(stored.bfloat16(), torch.int8))
        torch.testing.assert_close(rows, expected, equal_nan=True, atol=0, rtol=0)
        broken = rows.isnan().all(-1).sum()
        assert from_pool(flat).isnan().all(-1).sum() == 2 * (flat.shape[1] - 5) + broken


def test_a_broken_row_of_bytes_leaves_its_batch_mates_alone(native: NativeBackend) -> None:
    panels = native.arrange_pools(*byte_pools(1, 16, 32), torch.bfloat16)
    key, value = heads(2, 40, 1, 32, seed=1)
    key[3], value[3] = torch.nan, torch.nan
    native.store_kv(key, value, *panels, torch.arange(40))
    plan = native.plan_attention(
        [SequenceSpan(0, 1, 16, [0]), SequenceSpan(1, 1, 15, [1, 2])], block_size=16
    )
    query = heads(2, 3, 32, seed=2)
    got = native.paged_attention(query, *panels, plan, AttentionSpec(scale=0.2))
    assert got[0].isnan().all() and got[1].isfinite().all()


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
    [
        (8, 64, torch.bfloat16),
        (16, 80, torch.bfloat16),
        (16, 64, torch.float32),
        (16, 64, torch.int8),  # 60 and a scale
        (24, 68, torch.int8),
    ],
)
def test_pools_of_other_shapes_stay_as_they_are(
    block_size: int, dim: int, dtype: torch.dtype
) -> None:
    plain = pools(1, block_size, dim).to(dtype)
    assert not any(map(in_panels, NativeBackend().arrange_pools(*plain, dtype)))


@pytest.mark.parametrize("make", [pools, byte_pools])
def test_groups_that_the_library_refuses_are_computed_all_the_same(
    make: Callable[[int, int, int], Tensor],
) -> None:
    backend = NativeBackend()
    plain = torch.zeros_like(make(1, 16, 32))
    panels = backend.arrange_pools(*plain.clone(), torch.bfloat16)
    key, value = heads(2, 40, 1, 32, seed=1)
    for each in (plain.unbind(), panels):
        backend.store_kv(key, value, *each, torch.arange(40))
    query = heads(1, 300, 32, seed=2)
    plan = backend.plan_attention([SequenceSpan(0, 1, 40, [0, 1, 2])], 16)
    spec = AttentionSpec(scale=0.2)
    expected = backend.paged_attention(query, plain[0], plain[1], plan, spec)
    assert torch.equal(backend.paged_attention(query, *panels, plan, spec), expected)
