"""The CPU backend: torch operators, called in the way that is fast on CPUs.

Pages are gathered block by block (one contiguous run per head and block), decode rows of
similar length together, and the query heads of one group are packed as the rows of one matrix
product, so that each key and value is read once per group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.interface import AttentionPlan, PackedLinear, SequenceSpan
from phalanx.kernels.reference import ReferenceBackend

PACK_BATCH_HINT = 32
"""Rows that oneDNN lays the weights out for; a hint of 1 is slow at every batch size."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one query row each and similar lengths, padded to the longest."""

    rows: Tensor  # [B] batch rows
    blocks: Tensor  # [B * blocks per sequence]
    padding: Tensor | None  # [B, 1, tokens] additive -inf, None where nothing is padded
    tokens: int


@dataclass(frozen=True, slots=True)
class _PrefillSpan:
    """One sequence with several query rows."""

    rows: slice
    blocks: Tensor  # [blocks]
    length: int
    mask: Tensor | None  # [queries, length]; None = square causal


@dataclass(frozen=True, slots=True)
class _CpuPlan:
    decode: list[_DecodeGroup]
    prefill: list[_PrefillSpan]


def _decode_group(spans: Sequence[SequenceSpan], block_size: int) -> _DecodeGroup:
    longest = max(span.length for span in spans)
    width = -(-longest // block_size)
    table = torch.zeros(len(spans), width, dtype=torch.int64)
    for row, span in enumerate(spans):
        used = -(-span.length // block_size)
        table[row, :used] = torch.tensor(span.blocks[:used])
    lengths = torch.tensor([span.length for span in spans])
    tokens = width * block_size
    padded = torch.arange(tokens) >= lengths[:, None]
    padding = None
    if bool(padded.any()):
        padding = torch.zeros(padded.shape).masked_fill_(padded, -torch.inf).unsqueeze(1)
    rows = torch.tensor([span.start for span in spans])
    return _DecodeGroup(rows, table.flatten(), padding, tokens)


def _prefill_span(span: SequenceSpan, block_size: int) -> _PrefillSpan:
    blocks = torch.tensor(span.blocks[: -(-span.length // block_size)])
    rows = slice(span.start, span.start + span.num_query)
    mask = None
    if span.num_query < span.length:
        position = torch.arange(span.length)
        mask = position[None, :] <= position[-span.num_query :, None]
    return _PrefillSpan(rows, blocks, span.length, mask)


def _gather(pool: Tensor, blocks: Tensor) -> Tensor:
    """pool [K, blocks, block_size, D] -> [K, len(blocks) * block_size, D]."""
    heads, _, size, dim = pool.shape
    return pool.flatten(2, 3).index_select(1, blocks).view(heads, len(blocks) * size, dim)


class CpuBackend(ReferenceBackend):
    """Torch on the CPU; what is not overridden here is already fast enough as specified."""

    name = "cpu-torch"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """bfloat16 weights are re-laid by oneDNN once; others stay as they are."""
        if weight.dtype is not torch.bfloat16 or weight.numel() == 0:
            return super().pack_linear(weight, bias)
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return super().pack_linear(weight, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_BATCH_HINT)

        def linear(x: Tensor) -> Tensor:
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
            return result

        return linear

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """`index_copy_` copies whole head rows."""
        for source, pool in ((key, key_pool), (value, value_pool)):
            pool.flatten(1, 2).index_copy_(1, slots, source.transpose(0, 1).to(pool.dtype))

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """Sort the spans: decode rows by the power of two of their block count, and prefills."""
        by_size: defaultdict[int, list[SequenceSpan]] = defaultdict(list)
        prefill = []
        for span in spans:
            if span.num_query == 1:
                by_size[(-(-span.length // block_size) - 1).bit_length()].append(span)
            else:
                prefill.append(_prefill_span(span, block_size))
        return _CpuPlan([_decode_group(group, block_size) for group in by_size.values()], prefill)

    def paged_attention(
        self, query: Tensor, key_pool: Tensor, value_pool: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        """Two batched products per decode group; one fused call per prefilling sequence."""
        if not isinstance(plan, _CpuPlan):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        output = torch.empty_like(query)
        if key_pool.shape[0] == 0:
            return output
        for group in plan.decode:
            rows = query if len(group.rows) == len(query) else query[group.rows]
            attended = self._decode(rows, key_pool, value_pool, group, scale)
            if len(group.rows) == len(query):
                return attended
            output[group.rows] = attended
        for span in plan.prefill:
            output[span.rows] = self._prefill(query[span.rows], key_pool, value_pool, span, scale)
        return output

    def _decode(
        self, query: Tensor, key_pool: Tensor, value_pool: Tensor, group: _DecodeGroup, scale: float
    ) -> Tensor:
        batch, heads, dim = query.shape
        kv_heads = key_pool.shape[0]
        packed = query.view(batch, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        flat = (kv_heads * batch, -1, dim)
        keys = _gather(key_pool, group.blocks).view(kv_heads * batch, group.tokens, dim)
        values = _gather(value_pool, group.blocks).view(kv_heads * batch, group.tokens, dim)
        scores = torch.bmm(packed.reshape(flat), keys.to(query.dtype).transpose(1, 2)).float()
        scores = scores.mul_(scale).view(kv_heads, batch, -1, group.tokens)
        if group.padding is not None:
            scores += group.padding
        weights = scores.softmax(-1).to(query.dtype).view(kv_heads * batch, -1, group.tokens)
        mixed = torch.bmm(weights, values.to(query.dtype))
        return mixed.view(kv_heads, batch, -1, dim).transpose(0, 1).reshape(batch, heads, dim)

    def _prefill(
        self, query: Tensor, key_pool: Tensor, value_pool: Tensor, span: _PrefillSpan, scale: float
    ) -> Tensor:
        keys = _gather(key_pool, span.blocks)[:, : span.length].to(query.dtype)
        values = _gather(value_pool, span.blocks)[:, : span.length].to(query.dtype)
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return attended.squeeze(0).transpose(0, 1)
