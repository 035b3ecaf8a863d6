"""The compiled kernels against float64, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.cpu.library import ACTIVATIONS, library_path
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.int8 import from_pool, pool_width, to_pool
from phalanx.kernels.interface import AttentionSpec, SequenceSpan
from phalanx.kernels.reference import ReferenceBackend, weigh

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)
POOL_DTYPES = [*DTYPES, torch.int8]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    limit = TOLERANCE[got.dtype] * factor
    torch.testing.assert_close(got.double(), expected.double(), atol=limit, rtol=limit)


def test_plain_kernels_are_there_and_an_unknown_set_is_refused(
    natives: dict[str, NativeBackend],
) -> None:
    assert "plain" in natives and natives["plain"].isa == "plain"
    assert NativeBackend().isa == list(natives)[-1]  # the best one by default
    with pytest.raises(OSError, match="altivec"):
        NativeBackend(isa="altivec")


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.kernels.cpu.library.INTERFACE", -1)
    with pytest.raises(OSError, match="compiled from other sources"):
        NativeBackend()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 48), (7, 0), (0, 9), (101, 33), (33, 700)])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_linear_equals_float64_product(
    native: NativeBackend, dtype: torch.dtype, shape: tuple[int, int], biased: bool
) -> None:
    weight, bias = randn(*shape, seed=1, dtype=dtype), randn(shape[0], seed=2, dtype=dtype)
    linear = native.pack_linear(weight, bias if biased else None)
    for rows in (0, 1, 2, 7, 13, 40):
        x = randn(rows, shape[1], seed=rows, dtype=dtype)
        expected = F.linear(x.double(), weight.double(), bias.double() if biased else None)
        check(linear(x), expected, factor=max(shape[1], 1) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    native: NativeBackend, dtype: torch.dtype
) -> None:
    weight, x = randn(101, 333, seed=1, dtype=dtype), randn(64, 333, seed=2, dtype=dtype)
    together = native.pack_linear(weight, None)(x)
    three = NativeBackend(threads=3, isa=native.isa).pack_linear(weight, None)
    alone = NativeBackend(threads=1, isa=native.isa).pack_linear(weight, None)
    assert torch.equal(together, three(x))
    for size in (1, 2, 3, 5, 12, 13, 32):
        assert torch.equal(torch.cat([alone(part) for part in x.split(size)]), together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_packed_weight_are_read_back_exactly(
    native: NativeBackend, dtype: torch.dtype
) -> None:
    for columns in (1, 6, 33):
        weight = randn(70, columns, dtype=dtype)
        ids = torch.tensor([69, 0, 31, 32, 32])
        linear: Any = native.pack_linear(weight, None)
        assert torch.equal(linear.rows(ids), weight[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (64, 256), (101, 333), (5, 0)])
def test_int8_product_is_that_of_the_rounded_operands(
    native: NativeBackend, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Rounding is checked apart from summing: the sums are exact, up to the last float32 bits."""
    weight, bias = randn(*shape, seed=1), randn(shape[0], seed=2)
    linear = native.pack_linear_int8(weight, bias)
    for rows in (1, 2, 13):
        x = randn(rows, shape[1], seed=rows, dtype=dtype) * 3
        x[0] = 0
        pairs = []
        for matrix in (x.float(), weight):
            scale = (
                matrix.abs().amax(-1, keepdim=True) / 127
                if shape[1]
                else torch.ones(len(matrix), 1)
            )
            levels = (matrix / scale.masked_fill(scale == 0, 1)).round()
            assert shape[1] == 0 or levels.abs().max() <= 127
            pairs.append((levels.double(), scale.double()))
        (x8, x_scale), (w8, w_scale) = pairs
        expected = x8 @ w8.T * x_scale * w_scale.T + bias.double()
        got = linear(x)
        # a tie between two levels may be rounded either way: one level of one product
        slack = float((x_scale * w_scale.T).max()) * 127
        limit = TOLERANCE[dtype] * 10
        torch.testing.assert_close(got.double(), expected, atol=limit + slack, rtol=limit)
        dense = F.linear(x.double(), weight.double(), bias.double())
        assert (got.double() - dense).norm() <= 0.02 * dense.norm() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 16, 33, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(native: NativeBackend, dtype: torch.dtype, size: int, offset: float) -> None:
    backend = native
    x, residual = randn(5, size, seed=1, dtype=dtype), randn(5, size, seed=2, dtype=dtype)
    weight = randn(size, seed=3, dtype=dtype)
    expected = ReferenceBackend().add_rms_norm(
        x.double(), residual.double(), weight.double(), 1e-5, offset
    )
    check(
        backend.rms_norm(x, weight, 1e-5, offset),
        ReferenceBackend().rms_norm(x.double(), weight.double(), 1e-5, offset),
    )
    got = backend.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5, offset)
    check(got[0], expected[0])
    check(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 16, 64, 80])
def test_rope_reads_strided_heads_and_passes_the_rest_through(
    native: NativeBackend, dtype: torch.dtype, dim: int
) -> None:
    projected = randn(4, 5, dim, seed=1, dtype=dtype)
    for half in (1, dim // 2 - 1, dim // 2):
        angles = randn(4, half, seed=2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        got = native.rope(projected[:, :3], cos, sin)
        expected = ReferenceBackend().rope(projected[:, :3].double(), cos.double(), sin.double())
        check(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_range(
    native: NativeBackend, dtype: torch.dtype, activation: str
) -> None:
    huge = 1e15 if activation == "relu2" else 1e30
    x = torch.cat([torch.linspace(-200, 200, 997), torch.tensor([-huge, huge, 0.0])])
    x = torch.cat([x, torch.linspace(-6, 6, 501)]).to(dtype)
    pair = torch.stack([x, x.flip(0)])
    reference = ReferenceBackend()
    check(native.activate(pair, activation), reference.activate(pair.double(), activation))
    gate_up = torch.cat([pair, randn(2, len(x), seed=1).to(dtype)], dim=-1)
    check(native.gated(gate_up, activation), reference.gated(gate_up.double(), activation))
    if activation == "silu":
        assert torch.equal(native.silu_mul(gate_up), native.gated(gate_up, "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool_dtype", POOL_DTYPES)
def test_store_kv_writes_only_the_named_slots(
    native: NativeBackend, dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    pools = torch.zeros(2, 3, 4, 2, pool_width(5, pool_dtype), dtype=pool_dtype)
    projected = randn(2, 8, 5, dtype=dtype)
    key, value = projected[:, 2:5], projected[:, 5:]
    native.store_kv(key, value, pools[0], pools[1], torch.tensor([7, 2]))
    for pool, source in ((pools[0], key), (pools[1], value)):
        assert torch.equal(pool[:, 3, 1], to_pool(source[0], pool_dtype))
        assert torch.equal(pool[:, 1, 0], to_pool(source[1], pool_dtype))
        pool[:, [3, 1], [1, 0]] = 0
        assert not pool.any()


def test_argmax_is_the_first_largest(native: NativeBackend) -> None:
    x = randn(6, 77).round(decimals=1)
    x[0], x[1, 5:] = -torch.inf, 9.0
    assert torch.equal(native.argmax(x), x.argmax(-1))


Case = tuple[Tensor, Tensor, list[SequenceSpan], AttentionSpec]


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    """Query, pools, spans and spec; blocks are scattered over the pool."""
    kv_heads, group = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 3, 5, 49]))
    dim = draw(st.sampled_from([1, 7, 8, 33, 64, 80, 128]))
    block_size = draw(st.sampled_from([1, 3, 16, 64]))
    shapes = draw(
        st.lists(
            st.tuples(st.sampled_from([1, 1, 2, 9, 70]), st.sampled_from([0, 3, 63, 64, 200, 600])),
            min_size=1,
            max_size=4,
        )
    )
    seed = draw(st.integers(0, 2**16))
    heads = kv_heads * group
    spec = AttentionSpec(
        scale=0.3,
        window=draw(st.sampled_from([0, 0, 1, 5, 100])),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        alibi_slopes=draw(st.sampled_from([None, randn(heads, seed=seed).abs()])),
        sinks=draw(st.sampled_from([None, randn(heads, seed=seed) * 3])),
    )
    used = [-(-(new + old) // block_size) for new, old in shapes]
    free = torch.randperm(sum(used) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    spans, start = [], 0
    for (new, old), blocks in zip(shapes, used, strict=True):
        spans.append(SequenceSpan(start, new, new + old, [free.pop() for _ in range(blocks)]))
        start += new
    query_dtype, pool_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(POOL_DTYPES))
    pools = to_pool(randn(2, kv_heads, sum(used) + 3, block_size, dim, seed=seed), pool_dtype)
    return randn(start, heads, dim, seed=seed + 1, dtype=query_dtype), pools, spans, spec


@settings(max_examples=12, deadline=None)
@given(case=attention_cases())
def test_paged_attention_equals_dense_attention_in_float64(
    native: NativeBackend, case: Case
) -> None:
    query, pools, spans, spec = case
    backend = native
    plan = backend.plan_attention(spans, pools.shape[3])
    got = backend.paged_attention(query, pools[0], pools[1], plan, spec)
    group = query.shape[1] // max(pools.shape[1], 1)
    for span in spans:
        rows = slice(span.start, span.start + span.num_query)
        flat = from_pool(pools[:, :, list(span.blocks)].flatten(2, 3))[:, :, : span.length].double()
        keys, values = flat.repeat_interleave(group, dim=1)
        positions = torch.arange(span.length)
        distance = positions[None, :] - positions[-span.num_query :, None]
        scores = query[rows].transpose(0, 1).double() @ keys.transpose(1, 2)
        expected = (weigh(scores, distance, spec) @ values).transpose(0, 1)
        check(got[rows], expected)


@settings(max_examples=8, deadline=None)
@given(case=attention_cases(), chunk=st.sampled_from([1, 2, 17, 40]))
def test_attention_has_the_same_bits_in_any_batch_and_however_the_prompt_is_cut(
    native: NativeBackend, case: Case, chunk: int
) -> None:
    query, pools, spans, spec = case
    backend, alone = native, NativeBackend(threads=1, isa=native.isa)
    block_size = pools.shape[3]
    plan = backend.plan_attention(spans, block_size)
    together = backend.paged_attention(query, pools[0], pools[1], plan, spec)
    for span in spans:
        for first in range(0, span.num_query, chunk):
            count = min(chunk, span.num_query - first)
            length = span.length - span.num_query + first + count
            rows = slice(span.start + first, span.start + first + count)
            plan = alone.plan_attention([SequenceSpan(0, count, length, span.blocks)], block_size)
            part = alone.paged_attention(query[rows], pools[0], pools[1], plan, spec)
            assert torch.equal(part, together[rows])


def test_a_broken_row_leaves_its_batch_mates_alone(native: NativeBackend) -> None:
    backend = native
    query, pools = randn(2, 4, 16), randn(2, 2, 9, 4, 16, seed=1)
    spans = [SequenceSpan(0, 1, 7, [3, 1]), SequenceSpan(1, 1, 6, [2, 5])]
    plan = backend.plan_attention(spans, 4)
    spec = AttentionSpec(scale=0.25)
    whole = backend.paged_attention(query, pools[0], pools[1], plan, spec)
    pools[:, :, 3] = torch.nan
    pools[:, :, [5, 1], 3] = torch.nan  # beyond both sequences' ends
    for each in (pools, to_pool(pools, torch.int8)):
        broken = backend.paged_attention(query, each[0], each[1], plan, spec)
        assert broken[0].isnan().all()
        torch.testing.assert_close(broken[1], whole[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rows_have_the_same_bits_alone_and_in_any_batch(
    native: NativeBackend, natives: dict[str, NativeBackend], dtype: torch.dtype
) -> None:
    weight, x = randn(101, 333, seed=1, dtype=dtype), randn(64, 333, seed=2, dtype=dtype)
    together = native.pack_linear_int8(weight, None)(x)
    alone = NativeBackend(threads=1, isa=native.isa).pack_linear_int8(weight, None)
    for size in (1, 3, 13, 32):
        assert torch.equal(torch.cat([alone(part) for part in x.split(size)]), together)
    plain = natives["plain"].pack_linear_int8(weight, None)
    assert torch.equal(plain(x), together)  # the sums are whole numbers on every processor


def test_int8_product_of_extreme_rows(native: NativeBackend) -> None:
    """The largest sums, rows of zeros and of numbers near the least, and one that is broken."""
    weight = torch.full((33, 4096), -3.0)
    weight[1], weight[2, ::2] = 0, 3.0
    x = torch.full((5, 4096), 0.5, dtype=torch.float32)
    x[1], x[2], x[3, 7] = 0, 1e-38, torch.inf
    linear: Any = native.pack_linear_int8(weight, None)
    got = linear(x)
    assert got[0, 0] == -1.5 * 4096 and got[0, 1] == 0 and got[0, 2] == 0
    assert torch.equal(got[4], got[0]) and not got[1].any()
    assert got[2].abs().max() <= 1e-33 and got[3].isnan().all()
    assert torch.equal(linear.wide(x[:1]), got[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
def test_best_is_the_first_largest_of_the_outputs(
    native: NativeBackend, dtype: torch.dtype, int8: bool
) -> None:
    for outputs, inputs in ((1, 5), (33, 7), (700, 33)):
        weight = randn(outputs, inputs, seed=1, dtype=dtype)
        weight[outputs // 2 :] = weight[: outputs - outputs // 2].clone()  # all twice
        bias = randn(outputs, seed=2, dtype=dtype) if outputs == 33 else None
        for threads in (1, 3):
            backend = NativeBackend(threads=threads, isa=native.isa)
            pack = backend.pack_linear_int8 if int8 else backend.pack_linear
            linear: Any = pack(weight, bias)
            for rows in (0, 1, 13, 40):
                x = randn(rows, inputs, seed=rows, dtype=dtype)
                ids, values = linear.best(x)
                whole = linear.wide(x)
                assert torch.equal(ids, whole.argmax(-1)) and ids.dtype is torch.int64
                assert torch.equal(values, whole.amax(-1))


def test_best_tells_of_rows_that_are_not_finite(native: NativeBackend) -> None:
    weight = randn(300, 8)
    weight[170, 3] = torch.inf
    linear: Any = native.pack_linear(weight, None)
    x = randn(4, 8, seed=1)
    x[1, 3], x[3, 3] = 0.0, torch.nan
    assert linear.best(x)[1].isnan().all()  # 0 * inf is broken too
    weight[170, 3] = 0.0
    linear = native.pack_linear(weight, None)
    assert linear.best(x)[1].isnan().tolist() == [False, False, False, True]
    empty: Any = native.pack_linear(weight[:0], None)
    ids, values = empty.best(x)
    assert ids.tolist() == [0] * 4 and values.tolist() == [-torch.inf] * 4
