"""The CPU backend against the reference, and the reference against textbook formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.kernels.cpu.backend import CpuBackend
from phalanx.kernels.interface import SequenceSpan
from phalanx.kernels.reference import ReferenceBackend

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(0, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from([8, 16, 64]),
    block_size=st.sampled_from([1, 4, 16]),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_paged_attention_equals_dense_attention_in_float64(
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_blocks = sum(-(-(new + old) // block_size) for new, old in shapes) + 3
    free = torch.randperm(num_blocks, generator=generator).tolist()
    pools = torch.randn(2, kv_heads, num_blocks, block_size, dim, generator=generator).to(dtype)
    tokens = sum(new for new, _ in shapes)
    query = torch.randn(tokens, kv_heads * group, dim, generator=generator).to(dtype)
    spans, start = [], 0
    for new, old in shapes:
        used = -(-(new + old) // block_size)
        spans.append(SequenceSpan(start, new, new + old, [free.pop() for _ in range(used)]))
        start += new
    expected = torch.empty(tokens, kv_heads * group, dim, dtype=torch.float64)
    for span in spans:
        flat = pools[:, :, list(span.blocks)].flatten(2, 3)[:, :, : span.length].double()
        keys, values = flat.repeat_interleave(group, dim=1)
        for row in range(span.num_query):
            seen = span.length - span.num_query + row + 1
            q = query[span.start + row].double().unsqueeze(1)
            weights = (q @ keys[:, :seen].transpose(1, 2) * 0.3).softmax(-1)
            expected[span.start + row] = (weights @ values[:, :seen]).squeeze(1)
    for backend in (CpuBackend(), ReferenceBackend()):
        plan = backend.plan_attention(spans, block_size)
        got = backend.paged_attention(query, pools[0], pools[1], plan, 0.3)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(got.double(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 48), (7, 0), (0, 9), (101, 33)])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_linear_equals_float64_product(
    dtype: torch.dtype, shape: tuple[int, int], biased: bool
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    for backend in (CpuBackend(), ReferenceBackend()):
        linear = backend.pack_linear(weight, bias if biased else None)
        for rows in (1, 3, 40):
            x = torch.randn(rows, shape[1]).to(dtype)
            expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
            limit = TOLERANCE[dtype] * max(shape[1], 1) ** 0.5
            torch.testing.assert_close(linear(x).double(), expected, atol=limit, rtol=limit)


def test_store_kv_writes_only_the_named_slots() -> None:
    for backend in (CpuBackend(), ReferenceBackend()):
        pools = torch.zeros(2, 3, 4, 2, 5)
        key, value = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
        backend.store_kv(key, value, pools[0], pools[1], torch.tensor([7, 2]))
        for pool, source in ((pools[0], key), (pools[1], value)):
            assert torch.equal(pool[:, 3, 1], source[0]) and torch.equal(pool[:, 1, 0], source[1])
            assert int(pool.count_nonzero()) == source.numel()


def test_rope_turns_pairs_as_complex_numbers() -> None:
    heads = torch.randn(4, 2, 10, dtype=torch.float64)
    angles = torch.randn(4, 3, dtype=torch.float64)
    got = ReferenceBackend().rope(heads, angles.cos(), angles.sin())
    pairs = torch.complex(heads[..., :3], heads[..., 3:6]) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    expected = torch.cat([pairs.real, pairs.imag, heads[..., 6:]], dim=-1)
    torch.testing.assert_close(got, expected)
