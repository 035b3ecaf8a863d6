"""The CPU backend: torch operators, called in the way that is fast on CPUs.

Pages are gathered block by block (one contiguous run per head and block), decode rows of
similar length together, and the query heads of one group are packed as the rows of one matrix
product, so that each key and value is read once per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.int8 import from_pool, to_pool
from phalanx.kernels.interface import (
    AttentionPlan,
    AttentionSpec,
    PackedLinear,
    SequenceSpan,
    StateInputs,
)
from phalanx.kernels.reference import ReferenceBackend

from .int8 import Int8Linear, multiplies_exactly
from .plan import CpuPlan, DecodeGroup, PrefillSpan
from .scan import scan, step

PACK_BATCH_HINT = 32
"""Rows that oneDNN lays the weights out for; a hint of 1 is slow at every batch size."""
SCORE_ELEMENTS = 1024 * 1024
"""Scores that a prefill holds at a time where it cannot use the fused call."""


def _gather(pool: Tensor, blocks: Tensor) -> Tensor:
    """pool [K, blocks, block_size, D] -> [K, len(blocks) * block_size, D]; float32 from int8."""
    heads, _, size, width = pool.shape
    rows = pool.flatten(2, 3).index_select(1, blocks).view(heads, len(blocks) * size, width)
    return from_pool(rows)


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

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """oneDNN's int8 product where it is exact, else the levels as floats."""
        return Int8Linear(weight, bias, is_exact=multiplies_exactly())

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """`index_copy_` copies whole head rows."""
        for source, pool in ((key, key_pool), (value, value_pool)):
            pool.flatten(1, 2).index_copy_(1, slots, to_pool(source.transpose(0, 1), pool.dtype))

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """Decode rows sorted by length, and prefills."""
        return CpuPlan(spans, block_size)

    def plan_decode(self, block_tables: Tensor, lengths: Tensor, block_size: int) -> AttentionPlan:
        """Read now: on a CPU nothing runs later."""
        rows = zip(lengths.tolist(), block_tables.tolist(), strict=True)
        spans = [SequenceSpan(row, 1, length, blocks) for row, (length, blocks) in enumerate(rows)]
        return self.plan_attention(spans, block_size)

    def paged_attention(
        self,
        query: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        plan: AttentionPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Two batched products per decode group; one fused call per prefilling sequence."""
        if not isinstance(plan, CpuPlan):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        output = torch.empty_like(query)
        if key_pool.shape[0] == 0:
            return output
        step = plan.within(spec.window)
        for group in step.decode:
            rows = query if len(group.rows) == len(query) else query[group.rows]
            attended = _decode(rows, key_pool, value_pool, group, spec)
            if len(group.rows) == len(query):
                return attended
            output[group.rows] = attended
        prefill = _prefill if spec.has_plain_scores else _prefill_weighed
        for span in step.prefill:
            keys = _gather(key_pool, span.blocks)[:, : span.length].to(query.dtype)
            values = _gather(value_pool, span.blocks)[:, : span.length].to(query.dtype)
            output[span.rows] = prefill(query[span.rows], keys, values, span, spec)
        return output

    def state_step(self, inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """In place, for states are large and this is done by the speed of memory."""
        return step(inputs, state)

    def state_scan(self, inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """A run of tokens at a time."""
        return scan(inputs, state)


def _decode(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, group: DecodeGroup, spec: AttentionSpec
) -> Tensor:
    batch, heads, dim = query.shape
    kv_heads = key_pool.shape[0]
    packed = query.view(batch, kv_heads, heads // kv_heads, dim).transpose(0, 1)
    flat = (kv_heads * batch, -1, dim)
    keys = _gather(key_pool, group.blocks).view(kv_heads * batch, group.tokens, dim)
    values = _gather(value_pool, group.blocks).view(kv_heads * batch, group.tokens, dim)
    scores = torch.bmm(packed.reshape(flat), keys.to(query.dtype).transpose(1, 2)).float()
    scores = scores.mul_(spec.scale).view(kv_heads, batch, -1, group.tokens)
    if spec.softcap:
        scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if spec.alibi_slopes is not None:
        distance = torch.arange(group.tokens) + 1 - group.lengths[:, None]
        scores += spec.alibi_slopes.view(kv_heads, 1, -1, 1) * distance[:, None, :]
    if group.padding is not None:
        scores += group.padding
    weights = _softmax(scores, spec).to(query.dtype).view(kv_heads * batch, -1, group.tokens)
    mixed = torch.bmm(weights, values.to(query.dtype))
    return mixed.view(kv_heads, batch, -1, dim).transpose(0, 1).reshape(batch, heads, dim)


def _softmax(scores: Tensor, spec: AttentionSpec) -> Tensor:
    """Over the last dimension of [K, rows, group, tokens]."""
    if spec.sinks is None:
        return scores.softmax(-1)
    sinks = spec.sinks.view(scores.shape[0], 1, -1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


def _prefill(
    query: Tensor, keys: Tensor, values: Tensor, span: PrefillSpan, spec: AttentionSpec
) -> Tensor:
    attended = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=span.mask,
        is_causal=span.mask is None,
        scale=spec.scale,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1)


def _prefill_weighed(
    query: Tensor, keys: Tensor, values: Tensor, span: PrefillSpan, spec: AttentionSpec
) -> Tensor:
    """Scores in memory, as many query rows at a time as fit `SCORE_ELEMENTS`."""
    heads, (kv_heads, length, dim) = query.shape[1], keys.shape
    positions = torch.arange(length)
    step = max(SCORE_ELEMENTS // (heads * length), 1)
    outputs = []
    for start in range(0, len(query), step):
        rows = query[start : start + step]
        first = length - len(query) + start
        packed = rows.view(len(rows), kv_heads, -1, dim).transpose(0, 1)
        scores = (packed.reshape(kv_heads, -1, dim) @ keys.transpose(1, 2)).float()
        scores = scores.mul_(spec.scale).view(kv_heads, len(rows), -1, length)
        if spec.softcap:
            scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        distance = positions - positions[first : first + len(rows), None]
        if spec.alibi_slopes is not None:
            scores += spec.alibi_slopes.view(kv_heads, 1, -1, 1) * distance[:, None, :]
        seen = distance <= 0 if span.mask is None else span.mask[start : start + len(rows)]
        scores.masked_fill_(~seen[:, None, :], -torch.inf)
        weights = _softmax(scores, spec).to(query.dtype)
        mixed = weights.view(kv_heads, -1, length) @ values
        mixed = mixed.view(kv_heads, len(rows), -1, dim).transpose(0, 1)
        outputs.append(mixed.reshape(len(rows), heads, dim))
    return torch.cat(outputs)
