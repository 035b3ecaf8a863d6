"""What a kernel backend offers. `reference.py` is the specification; every backend equals it.

Shapes: T tokens of the step, H query heads, K key/value heads, D head dimension. A KV pool of
one layer is [K, num_blocks, block_size, D], so that one head's block is one contiguous run. An int8
pool is [K, num_blocks, block_size, D + 4]: levels, then the bytes of their float32 scale (`int8.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AttentionSpec:
    """How a layer weighs its scores. What is absent (0, None) costs nothing.

    The score of query i and key j <= i is `scale` * q.k, softly capped to `softcap` * tanh(s /
    `softcap`), plus `alibi_slopes`[head] * (j - i); keys with j <= i - `window` are not seen.
    `sinks`[head] is a further score whose weight goes nowhere.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # float32 [H]
    sinks: Tensor | None = None  # float32 [H]

    @property
    def has_plain_scores(self) -> bool:
        """Scores are only scaled; a window may hide some."""
        return not self.softcap and self.alibi_slopes is None and self.sinks is None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StateInputs:
    """What a state space of H heads of P channels takes in for L tokens, all float32.

    Channels `x` [L, H, P], steps [L, H], and `b`, `c` [L, G, N] of G sets of heads. Decay `a` is
    [H, N], or [H, 1] where all N numbers of a head's channels decay alike; `group` int64 [H] says
    which set a head belongs to. In both cases a < 0 and steps >= 0.
    """

    x: Tensor
    steps: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    group: Tensor

    def at(self, tokens: slice | Tensor) -> StateInputs:
        """The part of some tokens."""
        return StateInputs(
            x=self.x[tokens],
            steps=self.steps[tokens],
            a=self.a,
            b=self.b[tokens],
            c=self.c[tokens],
            group=self.group,
        )


class AttentionPlan(Protocol):
    """A backend's own preparation of a step, made once and used by every layer."""


class PackedLinear(Protocol):
    """A weight matrix in the layout that its backend multiplies fastest."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""


@runtime_checkable
class WideLinear(PackedLinear, Protocol):
    """A `PackedLinear` whose sums can be had before they are rounded."""

    def wide(self, x: Tensor) -> Tensor:
        """x [T, in] -> float32 [T, out]."""


class KernelBackend(Protocol):
    """Every operation of the decoder that is more than one torch call."""

    name: str

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare y = x @ weight.T + bias; weight [out, in], either side possibly empty."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """x / rms(x) * (offset + weight) over the last dimension, statistics in float32 (Zhang
        2019); with an offset, the product as well is in float32."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); may overwrite both inputs."""

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """(x - mean) / std * weight + bias over the last dimension (Ba 2016)."""

    def rope(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate heads [T, n, D] by cos, sin [T, rotary / 2] (Su 2021, half-split layout)."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for gate_up [T, 2 * n] = [gate | up] -> [T, n]."""

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """activate(gate) * up, shaped as for `silu_mul`."""

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """silu, gelu, gelu_tanh, gelu_quick (x * sigmoid(1.702 x)), relu or relu2 (squared)."""

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """Write key, value [T, K, D] into the pools; slot = block id * block_size + offset."""

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """Prepare a step's attention."""

    def paged_attention(
        self,
        query: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        plan: AttentionPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Causal attention of query [T, H, D] to the tokens in the pools -> [T, H, D]."""

    def causal_conv(self, window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu of each channel's convolution: window [R, L + W - 1, C], weight [C, W] ->
        [R, L, C]; the last of the W weights is the current token's."""

    def state_step(self, inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token for each of L sequences: states [L, H, P, N] -> (y [L, H, P], states); may
        overwrite those given.

        state = exp(steps a) state + steps x b^T, y = state c (Gu 2023; Dao 2024).
        """

    def state_scan(self, inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """L tokens of one sequence: state [H, P, N] -> (y [L, H, P], state behind the last)."""


@runtime_checkable
class CapturableBackend(KernelBackend, Protocol):
    """A backend whose attention can read what a step is about from device memory, late.

    So a decode step can be recorded once and replayed with other sequences: its plan holds the
    tensors, not what was in them, and nothing of it depends on a value that the host would read.
    """

    def plan_decode(self, block_tables: Tensor, lengths: Tensor, block_size: int) -> AttentionPlan:
        """One query row for each sequence; both are read when a layer attends.

        block_tables: int32 [B, blocks]; lengths: int64 [B], at least 1, the query's token
        included. Entries of a table beyond its length are any valid block.
        """


@runtime_checkable
class SamplingBackend(KernelBackend, Protocol):
    """A backend that chooses tokens in one pass over the logits; the host reads nothing."""

    def sample(
        self, logits: Tensor, temperatures: Tensor, stems: Tensor, positions: Tensor, first_id: int
    ) -> Tensor:
        """The best token of this slice for each row: float64 [n, 4] = (id, value, raw, broken).

        logits [n, m] of the tokens from `first_id` on, any floating dtype; temperatures float64
        [n], 0 = greedy; stems int64 [n], where a sample's keys start; positions int64 [n] of the
        new tokens. The value is logit + temperature * noise in float64; the noise of token i is
        -log(-log1p(-(b + 0.5) / 2**52)), b the upper 52 bits of output i of SplitMix64 from the
        row's key, which is output `position` of SplitMix64 from the stem. Ties go to the lowest
        id. A row with NaN or infinite logits has broken = 1.
        """

    def tail_sums(
        self,
        logits: Tensor,
        tops: Tensor,
        warmth: Tensor,
        lowest: Tensor,
        step: int,
        *,
        weighted: bool,
    ) -> Tensor:
        """Of each row's logits whose order key is at least lowest + d * step, for d in [0, 16), the
        number, or the sum of their weights exp((logit - top) / warmth): float64 [n, 16].

        logits float32 [n, m] without NaN, m > 0; tops, warmth float64 [n]; lowest int64 [n]. The
        order key is the int32 of a logit's bits (of 0.0 for -0.0), all but the sign flipped where it
        is negative, plus 2**31: greater logits have greater keys.
        """

    def merge_winners(self, gathered: Tensor) -> Tensor:
        """The winners over the ranks' results, [size, n, 4] -> [n, 4]: equal on all ranks, and
        broken where a row is broken on any."""
