"""Stacks of layers as the compiled backend runs them, and as float64 composes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.fused import HeadWidth, NormWeights, PlainLayer, PlainStack, Reduction
from phalanx.kernels.int8 import to_pool
from phalanx.kernels.interface import AttentionSpec, SequenceSpan
from phalanx.kernels.reference import ReferenceBackend

LAYERS, EPS = 3, 1e-5
SPANS = [SequenceSpan(0, 1, 11, [3, 9, 1]), SequenceSpan(1, 6, 8, [0, 5])]
TOKENS = 7
ROWS = torch.tensor([6, 0])
NORMS = {
    "pre": (0, 2),
    "sandwich": (0, 1, 2, 3),
    "post": (1, 3),
    "parallel": (0,),
    "parallel_two": (0, 2),
}
"""Which of (before attention, behind it, before the feed-forward block, behind it) there are."""


@dataclass(frozen=True)
class Kind:
    """What the layers of a stack compute, and the sizes that all ranks share."""

    block: str = "pre"
    norm: str = "rms"
    norm_bias: bool = False
    affine: bool = True
    offset: float = 1.0
    gated: bool = True
    activation: str = "silu"
    head_norm: str = "none"
    rotations: tuple[int | None, ...] = (0, 0, 0)
    clip: float = 0.0
    residual_scale: float = 1.0
    softcap: float = 0.0
    alibi: bool = False
    hidden: int = 24
    inner: int = 51
    dim: int = 10
    block_size: int = 4


@dataclass
class Layer:
    """One rank's weights of a layer; norms by place."""

    norms: list[NormWeights | None]
    linears: list[tuple[Tensor, Tensor | None]]
    pools: Tensor
    head_norms: tuple[Tensor, Tensor] | tuple[None, None]
    spec: AttentionSpec
    rotation: int | None


@dataclass
class Part:
    """What a rank holds."""

    kind: Kind
    heads: int
    kv_heads: int
    rank: int
    layers: list[Layer] = field(default_factory=list)

    @property
    def final(self) -> NormWeights:
        kind = self.kind
        return norm_weights(kind, 999, self.layers[0].pools.dtype)


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slots(kind: Kind, spans: Sequence[SequenceSpan] = SPANS) -> Tensor:
    places = []
    for span in spans:
        for position in range(span.length - span.num_query, span.length):
            block, offset = divmod(position, kind.block_size)
            places.append(span.blocks[block] * kind.block_size + offset)
    return torch.tensor(places)


def norm_weights(kind: Kind, seed: int, dtype: torch.dtype) -> NormWeights:
    weight = randn(kind.hidden, seed=seed, dtype=dtype) * 0.1 + (1.0 - kind.offset)
    bias = randn(kind.hidden, seed=seed + 1, dtype=dtype) * 0.3
    return NormWeights(weight if kind.affine else None, bias if kind.norm_bias else None)


def head_norms(
    kind: Kind, heads: int, kv_heads: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if kind.head_norm == "none":
        return None, None
    if kind.head_norm == "head":
        return randn(kind.dim, seed=7, dtype=dtype), randn(kind.dim, seed=8, dtype=dtype)
    return (
        randn(heads, kind.dim, seed=seed, dtype=dtype),
        randn(kv_heads, kind.dim, seed=seed + 1, dtype=dtype),
    )


def make_part(
    dtype: torch.dtype, kind: Kind = Kind(), rank: int = 0, heads: int = 4, kv_heads: int = 2
) -> Part:
    part = Part(kind, heads, kv_heads, rank)
    hidden, inner, dim = kind.hidden, kind.inner + rank, kind.dim
    rows = (heads + 2 * kv_heads) * dim
    into = (2 if kind.gated else 1) * inner
    shapes = [(rows, hidden), (hidden, heads * dim), (into, hidden), (hidden, inner)]
    for index in range(LAYERS):
        seed = 100 * index + 1000 * rank
        linears: list[tuple[Tensor, Tensor | None]] = []
        for place, shape in enumerate(shapes):
            bias = randn(shape[0], seed=seed + place + 10, dtype=dtype) if index else None
            linears.append((randn(*shape, seed=seed + place, dtype=dtype) * 0.2, bias))
        norms = [
            norm_weights(kind, 10 * index + place, dtype) if place in NORMS[kind.block] else None
            for place in range(4)
        ]
        sinks = randn(heads, seed=70, dtype=torch.float32) if index == 1 else None
        slopes = randn(heads, seed=71, dtype=torch.float32).abs() * 0.1 if kind.alibi else None
        spec = AttentionSpec(
            scale=0.3,
            window=5 if index == 1 else 0,
            softcap=kind.softcap,
            sinks=sinks,
            alibi_slopes=slopes,
        )
        pools = randn(2, kv_heads, 12, kind.block_size, dim, seed=seed + 20, dtype=dtype)
        heads_normed = head_norms(kind, heads, kv_heads, seed + 30, dtype)
        part.layers.append(Layer(norms, linears, pools, heads_normed, spec, kind.rotations[index]))
    return part


def normed(kind: Kind, x: Tensor, norm: NormWeights | None) -> Tensor:
    if norm is None:
        return x
    weight, bias = (None if each is None else each.double() for each in norm)
    if kind.norm == "rms":
        assert weight is not None
        return ReferenceBackend().rms_norm(x, weight, EPS, kind.offset)
    weight = None if weight is None else weight + kind.offset
    return ReferenceBackend().layer_norm(x, weight, bias, EPS)


def normed_heads(ranks: list[Part], index: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """The ranks' queries and keys [T, heads, D], in place."""
    kind = ranks[0].kind
    if kind.head_norm == "none":
        return
    for place in (0, 1):
        everywhere = torch.cat([pair[place] for pair in pairs], dim=1).flatten(1)
        scale = torch.rsqrt(everywhere.square().mean(-1) + EPS)[:, None, None]
        for part, pair in zip(ranks, pairs, strict=True):
            heads = pair[place]
            stored = part.layers[index].head_norms[place]
            assert stored is not None
            weight = stored.double()
            if kind.head_norm == "width":
                heads.copy_(heads * scale * weight)
            elif kind.norm == "rms":
                heads.copy_(ReferenceBackend().rms_norm(heads, weight, EPS, kind.offset))
            else:
                weight = weight + kind.offset
                heads.copy_(ReferenceBackend().layer_norm(heads, weight, None, EPS))


Angles = list[tuple[Tensor, Tensor]]


def attended(ranks: list[Part], index: int, x: Tensor, angles: Angles, int8: bool) -> Tensor:
    backend, total = ReferenceBackend(), torch.zeros_like(x)
    kind = ranks[0].kind
    plan = backend.plan_attention(SPANS, kind.block_size)
    projected = []
    for part in ranks:
        heads = apply(part.layers[index].linears[0], x, int8).view(TOKENS, -1, kind.dim)
        heads = heads.clamp(-kind.clip, kind.clip) if kind.clip else heads
        projected.append(heads.split([part.heads, part.kv_heads, part.kv_heads], dim=1))
    normed_heads(ranks, index, [(query, key) for query, key, _ in projected])
    for part, (query, key, value) in zip(ranks, projected, strict=True):
        layer = part.layers[index]
        if layer.rotation is not None:
            cos, sin = (each.double() for each in angles[layer.rotation])
            query, key = backend.rope(query, cos, sin), backend.rope(key, cos, sin)
        pools = layer.pools.double()
        pools = to_pool(pools, torch.int8) if int8 else pools
        backend.store_kv(key, value, pools[0], pools[1], slots(kind))
        mixed = backend.paged_attention(query, pools[0], pools[1], plan, layer.spec)
        total += apply(layer.linears[1], mixed.flatten(1), int8)
    return total


def fed(ranks: list[Part], index: int, x: Tensor, int8: bool) -> Tensor:
    backend, kind, total = ReferenceBackend(), ranks[0].kind, torch.zeros_like(x)
    for part in ranks:
        up, down = part.layers[index].linears[2:]
        act = backend.gated if kind.gated else backend.activate
        total += apply(down, act(apply(up, x, int8), kind.activation), int8)
    return total


def composed(ranks: list[Part], x: Tensor, angles: Angles, int8: bool = False) -> Tensor:
    """Every step as its own operation in float64, the ranks' parts summed.

    int8: of linear layers and pools.
    """
    kind, hidden = ranks[0].kind, x.double()
    for index in range(LAYERS):
        first, behind, second, last = ranks[0].layers[index].norms
        into = normed(kind, hidden, first)
        if kind.block.startswith("parallel"):
            other = into if second is None else normed(kind, hidden, second)
            both = attended(ranks, index, into, angles, int8) + fed(ranks, index, other, int8)
            hidden = hidden + kind.residual_scale * both
            continue
        added = normed(kind, attended(ranks, index, into, angles, int8), behind)
        hidden = hidden + kind.residual_scale * added
        added = normed(kind, fed(ranks, index, normed(kind, hidden, second), int8), last)
        hidden = hidden + kind.residual_scale * added
    return normed(kind, hidden, ranks[0].final)[ROWS]


def apply(linear: tuple[Tensor, Tensor | None], x: Tensor, int8: bool = False) -> Tensor:
    weight, bias = linear
    if int8:
        return ReferenceBackend().pack_linear_int8(weight, bias)(x)
    return torch.nn.functional.linear(x, weight.double(), None if bias is None else bias.double())


def packed(part: Part, backend: NativeBackend, *, int8: bool) -> list[PlainLayer]:
    """The layers on pools as the backend arranges them."""
    pack = backend.pack_linear_int8 if int8 else backend.pack_linear
    pool_dtype = torch.int8 if int8 else part.layers[0].pools.dtype
    pools = []
    for layer in part.layers:
        plain = layer.pools
        empty = torch.zeros_like(to_pool(plain, pool_dtype))
        pools.append(backend.arrange_pools(*empty, plain.dtype))
        keys, values = plain.flatten(2, 3).transpose(1, 2)
        backend.store_kv(keys, values, *pools[-1], torch.arange(len(keys)))
    return [
        PlainLayer(
            input_norm=layer.norms[0],
            qkv=pack(*layer.linears[0]),
            attention=layer.spec,
            output=pack(*layer.linears[1]),
            attention_norm=layer.norms[1],
            post_norm=layer.norms[2],
            up=pack(*layer.linears[2]),
            down=pack(*layer.linears[3]),
            mlp_norm=layer.norms[3],
            key_pool=keys,
            value_pool=values,
            query_norm=layer.head_norms[0],
            key_norm=layer.head_norms[1],
            rotation=layer.rotation,
        )
        for layer, (keys, values) in zip(part.layers, pools, strict=True)
    ]


def program(
    part: Part,
    reduction: Reduction,
    backend: NativeBackend,
    *,
    layers: slice = slice(None),
    ends: bool = True,
    int8: bool = False,
    width: HeadWidth | None = None,
    spans: Sequence[SequenceSpan] = SPANS,
    rows: Tensor = ROWS,
) -> Any:
    """The layers as one call; unless it ends there, of all rows."""
    kind = part.kind
    plain = packed(part, backend, int8=int8)[layers]
    stack = PlainStack(
        layers=plain,
        final_norm=part.final if ends else None,
        norm_eps=EPS,
        norm_offset=kind.offset,
        hidden_size=kind.hidden,
        num_heads=part.heads,
        num_kv_heads=part.kv_heads,
        head_dim=kind.dim,
        intermediate_size=kind.inner + part.rank,
        norm=kind.norm,
        parallel=kind.block.startswith("parallel"),
        gated=kind.gated,
        activation=kind.activation,
        residual_scale=kind.residual_scale,
        clip=kind.clip,
        head_width=width if kind.head_norm == "width" else None,
    )
    ready = backend.fuse(stack, reduction)
    assert ready is not None
    plan = backend.plan_attention(spans, kind.block_size)
    places = slots(kind, spans)
    wanted = rows if ends else torch.arange(len(places))
    return lambda x, angles: ready(x, angles, places, plan, wanted)


def inputs(dtype: torch.dtype, kind: Kind = Kind(), tokens: int = TOKENS) -> tuple[Tensor, Angles]:
    half = max(kind.dim // 2 - 1, 1)
    turns = [randn(tokens, half, seed=5 + pace, dtype=torch.float32) for pace in (0, 1)]
    angles = [(turn.cos().to(dtype), turn.sin().to(dtype)) for turn in turns]
    return randn(tokens, kind.hidden, seed=4, dtype=dtype), angles


class Stacks:
    """What the tests ask for; see the functions."""

    kind = staticmethod(Kind)
    part = staticmethod(make_part)
    composed = staticmethod(composed)
    program = staticmethod(program)
    inputs = staticmethod(inputs)


@pytest.fixture(scope="session")
def stacks() -> type[Stacks]:
    """To make kinds of layers, ranks' parts of them, and run both."""
    return Stacks
