"""The CPU backend against the reference, and the reference against textbook formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.cpu import backend as cpu_backend
from phalanx.kernels.cpu.backend import CpuBackend
from phalanx.kernels.interface import AttentionSpec, SequenceSpan
from phalanx.kernels.reference import ReferenceBackend

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@settings(max_examples=80, deadline=None)
@given(
    kv_heads=st.integers(0, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from([8, 16, 64]),
    block_size=st.sampled_from([1, 4, 16]),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([0, 0, 1, 3, 17]),
    softcap=st.sampled_from([0.0, 0.0, 0.7]),
    biased=st.sampled_from(["", "", "alibi", "sinks", "both"]),
    seed=st.integers(0, 2**16),
)
def test_paged_attention_equals_dense_attention_in_float64(
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    shapes: list[tuple[int, int]],
    dtype: torch.dtype,
    window: int,
    softcap: float,
    biased: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    slopes, sinks = torch.randn(2, kv_heads * group, generator=generator)
    spec = AttentionSpec(
        scale=0.3,
        window=window,
        softcap=softcap,
        alibi_slopes=slopes.abs() if biased in ("alibi", "both") else None,
        sinks=sinks if biased in ("sinks", "both") else None,
    )
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
            first = max(seen - window, 0) if window else 0
            q = query[span.start + row].double()
            for head in range(kv_heads * group):
                scores = keys[head, first:seen] @ q[head] * 0.3
                scores = softcap * (scores / softcap).tanh() if softcap else scores
                if spec.alibi_slopes is not None:
                    scores -= slopes[head].abs() * torch.arange(seen - first - 1, -1, -1)
                weights = scores.exp()
                total = weights.sum() + (
                    sinks[head].double().exp() if spec.sinks is not None else 0
                )
                expected[span.start + row, head] = weights / total @ values[head, first:seen]
    for backend in (CpuBackend(), ReferenceBackend()):
        plan = backend.plan_attention(spans, block_size)
        got = backend.paged_attention(query, pools[0], pools[1], plan, spec)
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


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_long_prompts_are_weighed_in_parts(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(cpu_backend, "SCORE_ELEMENTS", 4 * 37 * rows)
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(29, 4, 8, generator=generator)
    pools = torch.randn(2, 2, 10, 4, 8, generator=generator)
    spans = [SequenceSpan(0, 29, 37, [4, 1, 9, 0, 3, 7, 2, 8, 5, 6])]
    spec = AttentionSpec(scale=0.5, softcap=2.0, window=11, alibi_slopes=torch.ones(4) / 8)
    results = []
    for backend in (CpuBackend(), ReferenceBackend()):
        plan = backend.plan_attention(spans, 4)
        results.append(backend.paged_attention(query, pools[0], pools[1], plan, spec))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", lambda x: x / (1 + (-x).exp())),
        ("gelu", lambda x: x / 2 * (1 + (x / 2**0.5).erf())),
        ("gelu_tanh", lambda x: x / (1 + (-((8 / torch.pi) ** 0.5) * (x + 0.044715 * x**3)).exp())),
        ("gelu_quick", lambda x: x / (1 + (-1.702 * x).exp())),
        ("relu", lambda x: x * (x > 0)),
        ("relu2", lambda x: x * x * (x > 0)),
    ],
)
def test_activations_equal_their_formulas(name: str, formula: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-6, 6, 60, dtype=torch.float64).view(5, 12)
    for backend in (CpuBackend(), ReferenceBackend()):
        torch.testing.assert_close(backend.activate(x, name), formula(x))
        torch.testing.assert_close(backend.gated(x, name), formula(x[:, :6]) * x[:, 6:])
        with pytest.raises(KeyError):
            backend.activate(x, "gelu_exact")


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_norms_equal_their_formulas(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    x, residual = torch.randn(2, 5, 3, 7, generator=generator)
    weight, bias = torch.randn(2, *shape, generator=generator)
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    summed = x + residual
    root = (summed.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    for backend in (CpuBackend(), ReferenceBackend()):
        torch.testing.assert_close(backend.layer_norm(x, None, None, 1e-3), scaled)
        torch.testing.assert_close(backend.layer_norm(x, weight, None, 1e-3), scaled * weight)
        full = backend.layer_norm(x, weight, bias, 1e-3)
        torch.testing.assert_close(full, scaled * weight + bias)
        for offset in (0.0, 1.0):
            got = backend.add_rms_norm(x.clone(), residual.clone(), weight, 1e-3, offset)
            torch.testing.assert_close(got, (summed / root * (offset + weight), summed))
