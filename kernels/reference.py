"""The specification of every kernel in plain torch: slow, short, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import float8, int4
from .int8 import from_pool, quantize, to_pool
from .interface import AttentionPlan, AttentionSpec, PackedLinear, SequenceSpan, StateInputs

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class _Spans(list[SequenceSpan]):
    """The reference needs no preparation: its plan is the spans."""


class _Tables(NamedTuple):
    """A decode step whose tables are read when it attends."""

    blocks: Tensor
    lengths: Tensor


class _Float8:
    """A weight rounded to float8."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._rows, self._bias = float8.pack(weight), bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.of_rows(float8.Float8Rows(*float8.quantize(x), x.dtype))

    def of_rows(self, rows: float8.Float8Rows) -> Tensor:
        return float8.multiply(rows, *self._rows, self._bias)


class ReferenceBackend:
    """Ten lines of torch for each operation."""

    name = "reference"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The weight as it is."""
        return lambda x: F.linear(x, weight, bias)

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Levels are multiplied in float64, which is exact."""
        levels, scales = quantize(weight)

        def linear(x: Tensor) -> Tensor:
            x_levels, x_scales = quantize(x)
            sums = x_levels.double() @ levels.double().T
            product = sums.float() * (x_scales[:, None] * scales)
            return (product if bias is None else product + bias.float()).to(x.dtype)

        return linear

    def pack_linear_fp8(self, weight: Tensor, bias: Tensor | None) -> float8.Float8Linear:
        """Levels are multiplied in float64."""
        return _Float8(weight, bias)

    def pack_linear_int4(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The rounded weight as numbers."""
        rounded = int4.dequantize(*int4.quantize(weight), weight.shape[1])
        return lambda x: F.linear(x, rounded, bias)

    def add_rms_norm_quantize(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[float8.Float8Rows, Tensor]:
        """One after the other."""
        normed, residual = self.add_rms_norm(x, residual, weight, eps, offset)
        return float8.Float8Rows(*float8.quantize(normed), x.dtype), residual

    def gated_quantize(self, gate_up: Tensor, activation: str) -> float8.Float8Rows:
        """One after the other."""
        return float8.Float8Rows(*float8.quantize(self.gated(gate_up, activation)), gate_up.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Normalise in float32, round to the dtype of x, then scale; with an offset, scale first."""
        wide = _wide(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if offset:
            return (wide * (offset + _wide(weight))).to(x.dtype)
        return weight * wide.to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The sum is rounded to the dtype of x before it is normalised."""
        residual = x + residual
        return self.rms_norm(residual, weight, eps, offset), residual

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """A weight of several dimensions is broadcast over x."""
        if weight is None or weight.dim() == 1:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        normed = F.layer_norm(x, x.shape[-1:], None, None, eps) * weight
        return normed if bias is None else normed + bias

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

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """As `silu_mul`, with any activation."""
        if activation == "silu":
            return self.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activate(gate, activation) * up

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """By name; an unknown one is a KeyError."""
        return ACTIVATIONS[activation](x)

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """One row per token and head."""
        for source, pool in ((key, key_pool), (value, value_pool)):
            rows, flat = to_pool(source.transpose(0, 1), pool.dtype), pool.flatten(1, 2)
            if pool.dtype is float8.FLOAT8:  # torch moves bytes, but not these
                rows, flat = rows.view(torch.uint8), flat.view(torch.uint8)
            flat.index_copy_(1, slots, rows)

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """Nothing to prepare."""
        return _Spans(spans)

    def plan_decode(self, block_tables: Tensor, lengths: Tensor, block_size: int) -> AttentionPlan:
        """The tables themselves."""
        return _Tables(block_tables, lengths)

    def paged_attention(
        self,
        query: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        plan: AttentionPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Sequence by sequence, softmax in float32."""
        if isinstance(plan, _Tables):
            return _decode(query, key_pool, value_pool, plan, spec)
        if not isinstance(plan, _Spans):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        output = torch.empty_like(query)
        group = query.shape[1] // max(key_pool.shape[0], 1)
        for span in plan:
            rows = slice(span.start, span.start + span.num_query)
            blocks = torch.tensor(span.blocks, device=query.device)
            keys, values = (
                from_pool(pool[:, blocks].flatten(1, 2)[:, : span.length]).repeat_interleave(
                    group, dim=0
                )
                for pool in (key_pool, value_pool)
            )
            wide = _wide(query[rows].transpose(0, 1))
            scores = wide @ keys.transpose(1, 2).to(wide.dtype)
            positions = torch.arange(span.length, device=query.device)
            distance = positions[None, :] - positions[-span.num_query :, None]
            weights = weigh(scores, distance, spec)
            output[rows] = (weights @ values.to(wide.dtype)).transpose(0, 1).to(query.dtype)
        return output

    def causal_conv(self, window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A sum of W shifted products."""
        width = weight.shape[1]
        length = window.shape[1] - width + 1
        total = window[:, :length] * weight[:, 0]
        for tap in range(1, width):
            total = total + window[:, tap : tap + length] * weight[:, tap]
        return F.silu(total if bias is None else total + bias)

    def state_step(self, inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """One update for all sequences."""
        steps, group = inputs.steps, inputs.group
        b, c = inputs.b[:, group, None], inputs.c[:, group, None]
        decay = torch.exp(steps[..., None] * inputs.a)[:, :, None]
        state = decay * state + (steps[..., None] * inputs.x)[..., None] * b
        return (state * c).sum(-1), state

    def state_scan(self, inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """Token by token."""
        outputs = torch.empty_like(inputs.x)
        state = state[None]
        for token in range(len(inputs.x)):
            part = slice(token, token + 1)
            outputs[part], state = self.state_step(inputs.at(part), state)
        return outputs, state[0]


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype is torch.float64 else x.float()


def _decode(
    query: Tensor, key_pool: Tensor, value_pool: Tensor, plan: _Tables, spec: AttentionSpec
) -> Tensor:
    """All sequences together, over every block of their tables; what is beyond is hidden."""
    batch, heads, dim = query.shape
    kv_heads, _, block_size, _ = key_pool.shape
    if not kv_heads:
        return torch.empty_like(query)
    width = plan.blocks.shape[1] * block_size
    keys, values = (
        from_pool(pool.index_select(1, plan.blocks.flatten())).view(kv_heads, batch, width, dim)
        for pool in (key_pool, value_pool)
    )
    packed = _wide(query.view(batch, kv_heads, -1, dim).transpose(0, 1))
    scores = (packed @ keys.to(packed.dtype).transpose(2, 3)).transpose(0, 1)
    distance = torch.arange(width, device=query.device) + 1 - plan.lengths[:, None]
    scores = scores.reshape(batch, heads, 1, width)
    weights = weigh(scores, distance[:, None, None], spec)
    weights = weights.view(batch, kv_heads, -1, width).transpose(0, 1)
    mixed = (weights @ values.to(packed.dtype)).transpose(0, 1)
    return mixed.reshape(batch, heads, dim).to(query.dtype)


def weigh(scores: Tensor, distance: Tensor, spec: AttentionSpec) -> Tensor:
    """Unscaled scores [..., H, Q, L] to weights; distance, key position - query position, is
    [Q, L] or broadcasts with them."""
    scores = scores * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.alibi_slopes is not None:
        scores = scores + spec.alibi_slopes[:, None, None] * distance
    hidden = distance > 0
    if spec.window:
        hidden = hidden | (distance <= -spec.window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if spec.sinks is None:
        return scores.softmax(-1)
    sinks = spec.sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
