"""Attention over pages against attention over dense keys, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.kernels.float8 import FLOAT8
from phalanx.kernels.gpu import attention_tiles
from phalanx.kernels.gpu.attention_tiles import paged_attention
from phalanx.kernels.gpu.backend import GpuBackend
from phalanx.kernels.gpu.conversion import INTERPRETED
from phalanx.kernels.gpu.plan import GpuPlan
from phalanx.kernels.interface import AttentionSpec, SequenceSpan

pytestmark = [] if INTERPRETED else pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Pages:
    """Queries, pools and spans of sequences given as (new tokens, tokens before)."""

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        page: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(dim + heads)
        blocks = sum(-(-(new + old) // page) for new, old in shapes) + 2
        free = torch.randperm(blocks, generator=generator).tolist()
        pools = torch.randn(2, kv_heads, blocks, page, dim, generator=generator)
        tokens = sum(new for new, _ in shapes)
        query = torch.randn(tokens, heads, dim, generator=generator)
        self.query, self.pools = query.to(device, dtype), pools.to(device, dtype)
        self.page, self.spans, start = page, [], 0
        for new, old in shapes:
            used = [free.pop() for _ in range(-(-(new + old) // page))]
            self.spans.append(SequenceSpan(start, new, new + old, used))
            start += new
        # what no sequence owns must not be seen, not even as a factor of zero
        self.pools[:, :, free] = math.nan

    def run(self, spec: AttentionSpec) -> Tensor:
        """The kernels' answer."""
        plan = GpuPlan.of(self.spans, self.page, self.query.device)
        return paged_attention(self.query, self.pools[0], self.pools[1], plan, spec)

    def expected(self, spec: AttentionSpec) -> Tensor:
        """Dense attention in float64, sequence by sequence."""
        out = torch.empty(self.query.shape, dtype=torch.float64)
        group = self.query.shape[1] // self.pools.shape[1]
        for span in self.spans:
            rows = slice(span.start, span.start + span.num_query)
            pages = self.pools[:, :, list(span.blocks)].flatten(2, 3)[:, :, : span.length]
            keys, values = pages.cpu().double().repeat_interleave(group, 1)
            scores = self.query[rows].cpu().double().transpose(0, 1) @ keys.transpose(1, 2)
            scores *= spec.scale
            if spec.softcap:
                scores = spec.softcap * (scores / spec.softcap).tanh()
            position = torch.arange(span.length)
            distance = position - position[-span.num_query :, None]
            if spec.alibi_slopes is not None:
                scores += spec.alibi_slopes.cpu().double()[:, None, None] * distance
            hidden = (distance > 0) | (distance <= -(spec.window or math.inf))
            weights = scores.masked_fill(hidden, -math.inf).exp()
            total = weights.sum(-1, keepdim=True)
            if spec.sinks is not None:
                total += spec.sinks.cpu().double().exp()[:, None, None]
            out[rows] = (weights / total @ values).transpose(0, 1)
        return out


SHAPES: dict[str, list[tuple[int, int]]] = {
    "singles": [(1, 0), (1, 16), (1, 300)],
    "prompts": [(1, 5), (40, 0), (3, 130)],
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page", "dtype"),
    [
        (4, 2, 64, 16, torch.bfloat16),
        (6, 2, 80, 32, torch.float32),
        (5, 1, 128, 64, torch.float16),
        (1, 1, 256, 16, torch.float32),
        (20, 1, 96, 16, torch.bfloat16),
    ],
)
def test_attention(
    shapes: str,
    heads: int,
    kv_heads: int,
    dim: int,
    page: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    pages = Pages(SHAPES[shapes], heads, kv_heads, dim, page, dtype, device)
    spec = AttentionSpec(scale=dim**-0.5)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        pages.run(spec).cpu().double(), pages.expected(spec), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("shapes", SHAPES)
def test_keys_and_values_in_float8(shapes: str, device: torch.device) -> None:
    pages = Pages(SHAPES[shapes], 4, 2, 64, 16, torch.bfloat16, device)
    narrow = pages.pools.to(FLOAT8)
    pages.pools = narrow.bfloat16()
    expected = pages.expected(AttentionSpec(scale=0.125))
    pages.pools = narrow
    got = pages.run(AttentionSpec(scale=0.125))
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1.5e-2, atol=1.5e-2)


@pytest.mark.parametrize("shapes", ["singles", "prompts"])
@pytest.mark.parametrize(
    ("extra", "window"),
    [("none", 1), ("none", 40), ("softcap", 0), ("alibi", 40), ("sinks", 0), ("all", 260)],
)
def test_ways_to_weigh_scores(shapes: str, window: int, extra: str, device: torch.device) -> None:
    pages = Pages(SHAPES[shapes], 4, 2, 32, 16, torch.float32, device)
    given: dict[str, Any] = {}
    if extra in ("softcap", "all"):
        given["softcap"] = 1.5
    if extra in ("alibi", "all"):
        given["alibi_slopes"] = torch.rand(4, device=device) / 8
    if extra in ("sinks", "all"):
        given["sinks"] = torch.randn(4, device=device) * 3
    spec = AttentionSpec(scale=0.4, window=window, **given)
    torch.testing.assert_close(
        pages.run(spec).cpu().double(), pages.expected(spec), rtol=2e-5, atol=2e-5
    )


def test_a_long_sequence_has_longer_splits_instead_of_more(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(attention_tiles, "split_of", lambda kv_heads: (32, 4))
    monkeypatch.setattr(attention_tiles, "PROGRAMS", 6)
    pages = Pages([(1, 0), (1, 127), (1, 128), (1, 400)], 2, 1, 16, 16, torch.float32, device)
    spec = AttentionSpec(scale=0.4)
    torch.testing.assert_close(
        pages.run(spec).cpu().double(), pages.expected(spec), rtol=2e-5, atol=2e-5
    )


def _same(got: Tensor, expected: Tensor) -> None:
    """Bit-equal, but in the interpreter, whose matrix products depend on a row's place."""
    tolerance = TOLERANCE[got.dtype] if INTERPRETED else 0.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_row_depends_neither_on_its_batch_nor_on_how_its_prompt_was_cut(
    device: torch.device,
) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    pages = Pages([(150, 0), (1, 600), (2, 3)], 2, 1, 32, 16, dtype, device)
    spec = AttentionSpec(scale=0.4, window=90)
    together = pages.run(spec)
    whole, single, _ = pages.spans
    query = pages.query
    for first, count in ((0, 37), (37, 2), (39, 111)):
        pages.query = query[first : first + count]
        pages.spans = [SequenceSpan(0, count, first + count, whole.blocks)]
        _same(pages.run(spec), together[first : first + count])
    pages.query = query[150:151]
    pages.spans = [SequenceSpan(0, 1, single.length, single.blocks)]
    _same(pages.run(spec), together[150:151])


def test_a_decode_step_reads_tables_and_lengths_when_it_attends(device: torch.device) -> None:
    """A length of 0 is padding: zeros come out, and nothing is read."""
    pages = Pages([(1, 20), (1, 40)], 4, 2, 32, 16, torch.float32, device)
    spec = AttentionSpec(scale=0.4)
    expected = pages.expected(spec)
    tables = torch.zeros(4, 64, dtype=torch.int32, device=device)
    lengths = torch.zeros(4, dtype=torch.int64, device=device)
    plan = GpuBackend(device).plan_decode(tables, lengths, 16)
    for row, span in enumerate(pages.spans):
        lengths[row] = span.length
        tables[row, : len(span.blocks)] = torch.tensor(span.blocks, dtype=torch.int32)
    query = torch.cat([pages.query, torch.full_like(pages.query, math.nan)])
    got = GpuBackend(device).paged_attention(query, pages.pools[0], pages.pools[1], plan, spec)
    torch.testing.assert_close(got[:2].cpu().double(), expected, rtol=2e-5, atol=2e-5)
    assert not got[2:].any()


def test_a_rank_without_heads_and_a_step_without_rows(device: torch.device) -> None:
    pages = Pages([(1, 20)], 4, 2, 32, 16, torch.float32, device)
    plan = GpuPlan.of(pages.spans, 16, device)
    none = pages.pools[:, :0]
    spec = AttentionSpec(scale=1.0)
    assert paged_attention(pages.query[:, :0], none[0], none[1], plan, spec).shape == (1, 0, 32)
    empty = GpuPlan.of([], 16, device)
    got = paged_attention(pages.query[:0], pages.pools[0], pages.pools[1], empty, spec)
    assert got.shape == (0, 4, 32)


def test_heads_that_no_kernel_takes_are_refused(device: torch.device) -> None:
    pages = Pages([(1, 20)], 1, 1, 288, 16, torch.float16, device)
    with pytest.raises(ValueError, match="288 elements"):
        pages.run(AttentionSpec(scale=1.0))


def test_queries_must_stand_one_behind_the_other(device: torch.device) -> None:
    spans = [SequenceSpan(3, 1, 4, [0]), SequenceSpan(0, 3, 3, [1])]
    with pytest.raises(ValueError, match="one behind the other"):
        GpuPlan.of(spans, 16, device)
