"""What a kernel backend offers. `reference.py` is the specification; every backend equals it.

Shapes: T tokens of the step, H query heads, K key/value heads, D head dimension. A KV pool of
one layer is [K, num_blocks, block_size, D], so that one head's block is one contiguous run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part in a step's batch.

    Its queries are rows [start, start + num_query) of the batch, at positions
    [length - num_query, length); it attends to `length` tokens, whose keys and values stand in
    `blocks` (block ids in order).
    """

    start: int
    num_query: int
    length: int
    blocks: Sequence[int]


class AttentionPlan(Protocol):
    """A backend's own preparation of a step, made once and used by every layer."""


class PackedLinear(Protocol):
    """A weight matrix in the layout that its backend multiplies fastest."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""


class KernelBackend(Protocol):
    """Every operation of the decoder that is more than one torch call."""

    name: str

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare y = x @ weight.T + bias; weight [out, in], either side possibly empty."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension, statistics in float32 (Zhang 2019)."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); may overwrite both inputs."""

    def rope(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads [T, n, D] by cos, sin [T, rotary / 2] (Su 2021, half-split layout)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [T, 2 * n] = [gate | up] -> [T, n]."""

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """Write key, value [T, K, D] into the pools; slot = block id * block_size + offset."""

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """Prepare a step's attention."""

    def paged_attention(
        self, query: Tensor, key_pool: Tensor, value_pool: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        """Causal attention of query [T, H, D] to the tokens in the pools -> [T, H, D]."""
