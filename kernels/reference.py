"""The specification of every kernel in plain torch: slow, short, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import AttentionPlan, PackedLinear, SequenceSpan


class _Spans(list[SequenceSpan]):
    """The reference needs no preparation: its plan is the spans."""


class ReferenceBackend:
    """Ten lines of torch for each operation."""

    name = "reference"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The weight as it is."""
        return lambda x: F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise in float32, round to the dtype of x, then scale."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The sum is rounded to the dtype of x before it is normalised."""
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def rope(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pair i turns element i with element i + rotary / 2; the rest passes through."""
        half = cos.shape[-1]
        first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """The gate is activated before the product is rounded."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """One row per token and head."""
        for source, pool in ((key, key_pool), (value, value_pool)):
            pool.flatten(1, 2)[:, slots] = source.transpose(0, 1).to(pool.dtype)

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """Nothing to prepare."""
        return _Spans(spans)

    def paged_attention(
        self, query: Tensor, key_pool: Tensor, value_pool: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        """Sequence by sequence, softmax in float32."""
        if not isinstance(plan, _Spans):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        output = torch.empty_like(query)
        group = query.shape[1] // max(key_pool.shape[0], 1)
        for span in plan:
            rows = slice(span.start, span.start + span.num_query)
            blocks = torch.tensor(span.blocks, device=query.device)
            keys, values = (
                pool[:, blocks].flatten(1, 2)[:, : span.length].repeat_interleave(group, dim=0)
                for pool in (key_pool, value_pool)
            )
            scores = query[rows].transpose(0, 1).float() @ keys.transpose(1, 2).float() * scale
            position = torch.arange(span.length, device=query.device)
            future = position[None, :] > position[-span.num_query :, None]
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            output[rows] = (weights @ values.float()).transpose(0, 1).to(query.dtype)
        return output
