"""Every layer, cut over 1 to 5 ranks, equals the whole layer.

Linear layers and tables are compared bit by bit: on small whole numbers every product and every
partial sum is exact in each dtype, so that no order of summation can hide or excuse a wrong cut.
Blocks with a nonlinearity are compared with float64, within a few units of the dtype's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.interface import SequenceSpan
from phalanx.kernels.select import select_backend
from phalanx.protos.shards import cut, cut_model
from phalanx.protos.specs import CacheSpec, DecoderSpec, RopeSpec
from phalanx.workers.batch import Batch
from phalanx.workers.cache import LayerCache, PagedCache
from phalanx.workers.decoder import Norm
from phalanx.workers.layers.attention import Attention
from phalanx.workers.layers.embedding import VocabParallelEmbedding, VocabParallelHead, VocabTable
from phalanx.workers.layers.linear import ColumnParallelLinear, Output, RowParallelLinear
from phalanx.workers.layers.mlp import GatedMLP
from phalanx.workers.layers.rope import RotaryTable
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

CPU = torch.device("cpu")
BACKEND, _ = select_backend("cpu")
BLOCK_SIZE = 4
NAMES = LayerNames(
    **{name: name for name in LayerNames.__dataclass_fields__ if not name.endswith("_bias")}
)
BIASED = LayerNames(**{name: name for name in LayerNames.__dataclass_fields__})

sizes = st.integers(1, 5)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31)
examples = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
OnRanks = Callable[[int, Callable[[TensorParallel], Any]], list[Any]]
Fill = Callable[..., None]


class Numbers:
    """Random tensors of one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def whole(self, *shape: int) -> Tensor:
        """Of -2 to 2; products over 40 or fewer of them stay below 2**8, the bits of bfloat16."""
        return torch.randint(-2, 3, shape, generator=self._generator).double()

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """About 1 in size, rounded to `dtype`, held in float64."""
        return torch.randn(shape, generator=self._generator).to(dtype).double()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, roundings: float) -> None:
    """Within `roundings` units of the dtype at the size of the largest result."""
    assert actual.dtype is dtype
    limit = roundings * torch.finfo(dtype).eps * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)


@examples
@given(st.lists(st.integers(1, 23), min_size=1, max_size=3), st.integers(1, 40), sizes, dtypes,
       st.booleans(), seeds)  # fmt: skip
def test_column_parallel_rows_are_the_rows_of_the_whole(
    on_ranks: OnRanks,
    fill: Fill,
    features: list[int],
    width: int,
    size: int,
    dtype: torch.dtype,
    biased: bool,
    seed: int,
) -> None:
    numbers = Numbers(seed)
    x = numbers.whole(5, width)
    weights = {f"w{index}": numbers.whole(rows, width) for index, rows in enumerate(features)}
    weights |= {f"b{index}": numbers.whole(rows) for index, rows in enumerate(features)}

    def work(group: TensorParallel) -> list[Tensor]:
        outputs = [
            Output(f"w{i}", cut(rows, size, group.rank), f"b{i}" if biased and i != 1 else None)
            for i, rows in enumerate(features)
        ]
        layer = ColumnParallelLinear(width, outputs, dtype, CPU)
        fill(layer.pieces, weights)
        layer.pack(BACKEND)
        return list(layer(x.to(dtype)).split(layer.sizes, dim=1))

    parts = on_ranks(size, work)
    for index in range(len(features)):
        bias = weights[f"b{index}"] if biased and index != 1 else None
        whole = torch.cat([part[index] for part in parts], dim=1)
        assert torch.equal(whole, F.linear(x, weights[f"w{index}"], bias).to(dtype))


@examples
@given(st.integers(1, 40), st.integers(1, 33), sizes, dtypes, st.booleans(), seeds)
def test_row_parallel_sums_to_the_whole(
    on_ranks: OnRanks,
    fill: Fill,
    width: int,
    out: int,
    size: int,
    dtype: torch.dtype,
    biased: bool,
    seed: int,
) -> None:
    """The bias is added once, whatever the number of ranks; ranks without columns take part."""
    numbers = Numbers(seed)
    weights = {"w": numbers.whole(out, width), "b": numbers.whole(out)}
    exact, rough = numbers.whole(5, width), numbers.normal(5, width, dtype=dtype)

    def work(group: TensorParallel) -> tuple[Tensor, Tensor]:
        columns = cut(width, size, group.rank)
        layer = RowParallelLinear("w", columns, out, group, dtype, CPU, "b" if biased else None)
        fill(layer.pieces, weights)
        layer.pack(BACKEND)
        mine = slice(columns.start, columns.stop)
        return layer(exact[:, mine].to(dtype)), layer(rough[:, mine].to(dtype))

    results = on_ranks(size, work)
    bias = weights["b"] if biased else None
    for on_whole_numbers, on_floats in results:
        assert torch.equal(on_whole_numbers, F.linear(exact, weights["w"], bias).to(dtype))
        assert torch.equal(on_floats, results[0][1])
        # one rounding of each partial sum, of their total, and of the bias
        expected = F.linear(rough, weights["w"], bias)
        assert_close(on_floats, expected, dtype, roundings=2 * size + 2)


@examples
@given(st.integers(1, 60), st.integers(1, 33), sizes, dtypes, seeds, st.data())
def test_vocabulary_parallel_embedding_is_a_lookup(
    on_ranks: OnRanks,
    fill: Fill,
    vocab: int,
    hidden: int,
    size: int,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    table = Numbers(seed).normal(vocab, hidden, dtype=dtype)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=9)))

    def work(group: TensorParallel) -> Tensor:
        part = VocabTable("t", cut(vocab, size, group.rank), hidden, dtype, CPU)
        fill(part.pieces, {"t": table})
        return VocabParallelEmbedding(part, group)(ids)

    for result in on_ranks(size, work):
        assert torch.equal(result, table[ids].to(dtype))


@examples
@given(st.integers(1, 60), st.integers(1, 40), sizes, dtypes, st.booleans(), seeds)
def test_vocabulary_parallel_logits_are_columns_of_the_whole(
    on_ranks: OnRanks,
    fill: Fill,
    vocab: int,
    hidden: int,
    size: int,
    dtype: torch.dtype,
    tied: bool,
    seed: int,
) -> None:
    numbers = Numbers(seed)
    table, x = numbers.whole(vocab, hidden), numbers.whole(4, hidden)

    def work(group: TensorParallel) -> Tensor:
        part = VocabTable("t", cut(vocab, size, group.rank), hidden, dtype, CPU)
        fill(part.pieces, {"t": table})
        head = VocabParallelHead(part, shared=tied)
        head.pack(BACKEND)
        return head(x.to(dtype))

    logits = torch.cat(on_ranks(size, work), dim=1)
    assert torch.equal(logits, F.linear(x, table).to(dtype))


@st.composite
def models(draw: st.DrawFn) -> DecoderSpec:
    kv_heads = draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(1, 8))
    biased = draw(st.booleans())
    return DecoderSpec(
        family="llama",
        num_layers=1,
        hidden_size=draw(st.integers(1, 40)),
        intermediate_size=draw(st.integers(1, 50)),
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=7,
        max_context=32,
        norm_eps=1e-5,
        rope=RopeSpec(theta=100.0, rotary_dim=head_dim),
        attention_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        attention_sinks=draw(st.booleans()),
    )


@examples
@given(models(), sizes, dtypes, seeds)
def test_gated_mlp(
    on_ranks: OnRanks, fill: Fill, model: DecoderSpec, size: int, dtype: torch.dtype, seed: int
) -> None:
    numbers = Numbers(seed)
    hidden, inner = model.hidden_size, model.intermediate_size
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    weights = {name: _scaled(numbers, shape, dtype) for name, shape in shapes.items()}
    weights |= {f"{name}_bias": numbers.normal(shapes[name][0], dtype=dtype) for name in shapes}
    x = numbers.normal(5, hidden, dtype=dtype)

    def work(group: TensorParallel) -> Tensor:
        columns = cut_model(model, size, group.rank).mlp
        names = BIASED if model.mlp_bias else NAMES
        layer = GatedMLP(model, columns, names, group, BACKEND, dtype, CPU)
        fill([*layer.into.pieces, *layer.down.pieces], weights)
        layer.into.pack(BACKEND)
        layer.down.pack(BACKEND)
        return layer(x.to(dtype))

    def linear(name: str, value: Tensor) -> Tensor:
        bias = weights[f"{name}_bias"] if model.mlp_bias else None
        return F.linear(value, weights[name], bias)

    expected = linear("down", F.silu(linear("gate", x)) * linear("up", x))
    results = on_ranks(size, work)
    for result in results:
        assert torch.equal(result, results[0])
        assert_close(result, expected, dtype, roundings=2 * size + 14)


def _scaled(numbers: Numbers, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A matrix that keeps the size of what it multiplies."""
    return (numbers.normal(*shape, dtype=dtype) / shape[1] ** 0.5).to(dtype).double()


def _turned(heads: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers: pair (i, i + D/2) times exp(i position theta**-2i/D)."""
    dim = heads.shape[-1]
    angles = torch.outer(positions.double(), theta ** -(torch.arange(0, dim, 2).double() / dim))
    pairs = torch.complex(heads[..., : dim // 2], heads[..., dim // 2 :])
    pairs = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def _attention(model: DecoderSpec, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Causal grouped-query attention over the whole of x [T, hidden], head by head, in float64."""
    tokens, dim = len(x), model.head_dim
    positions = torch.arange(tokens)

    def project(name: str) -> Tensor:
        bias = weights[f"{name}_bias"] if model.attention_bias else None
        return F.linear(x, weights[name], bias).view(tokens, -1, dim)

    query = _turned(project("query"), positions, model.rope.theta)
    key = _turned(project("key"), positions, model.rope.theta)
    value = project("value")
    outputs = []
    for head in range(model.num_heads):
        kv = head * model.num_kv_heads // model.num_heads
        scores = query[:, head] @ key[:, kv].T / dim**0.5
        scores = scores.masked_fill(positions[None, :] > positions[:, None], -torch.inf)
        shares = scores.exp()
        total = shares.sum(-1, keepdim=True)
        if model.attention_sinks:
            total += weights["sinks"][head].exp()
        outputs.append(shares / total @ value[:, kv])
    bias = weights["output_bias"] if model.output_bias else None
    return F.linear(torch.cat(outputs, dim=-1), weights["output"], bias)


def _batch(rotary: RotaryTable, first: int, count: int, blocks: list[int]) -> Batch:
    """Tokens [first, first + count) of one sequence."""
    positions = torch.arange(first, first + count)
    cos, sin = rotary.at(positions)
    slots = torch.tensor(blocks)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    plan = BACKEND.plan_attention([SequenceSpan(0, count, first + count, blocks)], BLOCK_SIZE)
    return Batch(positions, slots, cos, sin, plan, positions[:0], [], [])


@examples
@given(models(), sizes, dtypes, seeds, st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_attention_with_fused_projections(
    on_ranks: OnRanks,
    fill: Fill,
    model: DecoderSpec,
    size: int,
    dtype: torch.dtype,
    seed: int,
    chunks: list[int],
) -> None:
    """Uneven heads and groups, and more ranks than key/value heads; a sequence in chunks."""
    numbers = Numbers(seed)
    hidden, dim = model.hidden_size, model.head_dim
    query, kv = model.num_heads * dim, model.num_kv_heads * dim
    shapes = {"query": (query, hidden), "key": (kv, hidden), "value": (kv, hidden)}
    shapes["output"] = (hidden, query)
    weights = {name: _scaled(numbers, shape, dtype) for name, shape in shapes.items()}
    weights |= {f"{name}_bias": numbers.normal(shapes[name][0], dtype=dtype) for name in shapes}
    weights["sinks"] = 2 * numbers.normal(model.num_heads, dtype=dtype)
    x = numbers.normal(sum(chunks), hidden, dtype=dtype)
    rotary = RotaryTable(model.rope, model.max_context, dtype, CPU)

    def work(group: TensorParallel) -> Tensor:
        heads = cut_model(model, size, group.rank).heads
        names = BIASED if model.attention_bias else NAMES
        layer = Attention(model, heads, names, group, BACKEND, dtype, CPU)
        fill([*layer.qkv.pieces, *layer.output.pieces, *layer.pieces], weights)
        layer.qkv.pack(BACKEND)
        layer.output.pack(BACKEND)
        cache = _cache(heads.kv.size, dim, dtype)
        outputs, first = [], 0
        for count in chunks:
            batch = _batch(rotary, first, count, blocks=[3, 0, 5, 1, 4])
            outputs.append(layer(x[first : first + count].to(dtype), batch, cache))
            first += count
        return torch.cat(outputs)

    expected = _attention(model, weights, x)
    results = on_ranks(size, work)
    for result in results:
        assert torch.equal(result, results[0])
        assert_close(result, expected, dtype, roundings=2 * size + 24)


def _cache(kv_heads: int, dim: int, dtype: torch.dtype) -> LayerCache:
    name = str(dtype).removeprefix("torch.")
    spec = CacheSpec(block_size=BLOCK_SIZE, num_blocks=6, dtype=name)  # type: ignore[arg-type]
    return PagedCache(spec, 1, kv_heads, dim, CPU).layers[0]


@examples
@given(st.integers(1, 64), st.integers(1, 6), dtypes, seeds)
def test_norm_is_the_same_on_every_rank_and_keeps_the_residual(
    on_ranks: OnRanks, fill: Fill, hidden: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    numbers = Numbers(seed)
    weight = numbers.normal(hidden, dtype=dtype)
    x, residual = (numbers.normal(tokens, hidden, dtype=dtype) for _ in range(2))
    summed = (x + residual).to(dtype).double()
    expected = summed / (summed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def work(group: TensorParallel) -> tuple[Tensor, Tensor]:
        norm = Norm("n", hidden, dtype, CPU)
        fill(norm.pieces, {"n": weight})
        return BACKEND.add_rms_norm(x.to(dtype), residual.to(dtype), norm.weight, 1e-5)

    for normed, total in on_ranks(3, work):
        assert torch.equal(total.double(), summed)
        assert_close(normed, expected, dtype, roundings=2)


@examples
@given(st.integers(1, 32), st.integers(1, 300), st.floats(10, 1e6), dtypes)
def test_rope_table_is_cosine_and_sine_of_every_position(
    half: int, context: int, theta: float, dtype: torch.dtype
) -> None:
    table = RotaryTable(RopeSpec(theta=theta, rotary_dim=2 * half), context, dtype, CPU)
    positions = torch.arange(context).flip(0)
    exponent = -torch.arange(0, 2 * half, 2).double() / (2 * half)
    angles = torch.outer(positions.double(), theta**exponent)
    # float32 angles of up to `context` are off by half a unit of that size
    limit = torch.finfo(dtype).eps + context * torch.finfo(torch.float32).eps
    for part, expected in zip(table.at(positions), (angles.cos(), angles.sin()), strict=True):
        assert part.shape == (context, half) and part.dtype is dtype
        torch.testing.assert_close(part.double(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_layer_that_was_not_packed_says_so(on_ranks: OnRanks, size: int) -> None:
    def work(group: TensorParallel) -> str:
        layer = RowParallelLinear("w", cut(3, size, group.rank), 2, group, torch.float32, CPU)
        with pytest.raises(RuntimeError, match="before pack"):
            layer(torch.ones(1, 3))
        return "said"

    assert on_ranks(size, work) == ["said"] * size
