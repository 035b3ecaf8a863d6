"""The backend for CUDA devices: one file per kernel beside this one, put together here.

Every call may be captured in a graph: nothing waits for the device, grids and allocations depend
on shapes and on the plan's plain values alone, lengths and tables are read by the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.kernels.float8 import Float8Linear, Float8Rows
from phalanx.kernels.fused import HeadNorms, PeerBuffers
from phalanx.kernels.interface import AttentionPlan, AttentionSpec, PackedLinear, SequenceSpan
from phalanx.kernels.reference import ReferenceBackend

from .activation import activate, gated_quantize
from .all_reduce import all_reduce_add_rms_norm, all_reduce_add_rms_norm_quantize
from .attention_tiles import paged_attention
from .flash import FlashAttention
from .float8 import GpuFloat8Linear
from .int4 import GpuInt4Linear
from .linear import GpuLinear
from .norm import layer_norm, rms_norm, rms_norm_quantize
from .plan import GpuPlan
from .rope import rope, rope_store_kv, store_kv
from .sampling import merge, sample, tail_sums


class GpuBackend(ReferenceBackend):
    """Triton kernels; what is not overridden is one torch call."""

    name = "gpu"

    def __init__(
        self,
        device: torch.device | str = "cuda",
        *,
        flash: FlashAttention | None = None,
        programmatic: bool = False,
    ) -> None:
        """`flash` takes prompts where it can. `programmatic`: products of few rows load weights
        while the kernel before them still runs; it takes devices of capability 9 or newer."""
        self.device, self.flash = torch.device(device), flash
        self._programmatic = programmatic

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The weight as it is; own kernels for up to 16 rows."""
        return GpuLinear(weight, bias, programmatic=self._programmatic)

    def pack_linear_fp8(self, weight: Tensor, bias: Tensor | None) -> Float8Linear:
        """The weight in float8; own kernels for up to 16 rows."""
        return GpuFloat8Linear(weight, bias, programmatic=self._programmatic)

    def pack_linear_int4(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The weight in 4 bits, unpacked by its own kernel for up to 64 rows."""
        return GpuInt4Linear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """One kernel, rows in registers."""
        return rms_norm(x, weight, eps, offset, ahead=self._programmatic)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """One kernel; the sum is written into `residual`."""
        if not residual.is_contiguous():
            residual = residual.contiguous()
        return rms_norm(
            x, weight, eps, offset, residual=residual, ahead=self._programmatic
        ), residual

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """One kernel, rows in registers."""
        return layer_norm(x, weight, bias, eps)

    def rope(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One kernel; takes views of a fused projection."""
        return rope(heads, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """One kernel."""
        return activate(gate_up, "silu", gated=True, ahead=self._programmatic)

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """One kernel."""
        return activate(gate_up, activation, gated=True, ahead=self._programmatic)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """One kernel."""
        return activate(x, activation, ahead=self._programmatic)

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """One kernel for both; a negative slot is passed over."""
        store_kv(key, value, key_pool, value_pool, slots)

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """One copy to the device."""
        return GpuPlan.of(spans, block_size, self.device)

    def plan_decode(self, block_tables: Tensor, lengths: Tensor, block_size: int) -> AttentionPlan:
        """One query for each sequence; tables int32 [B, blocks] and lengths [B] are read when a
        layer attends, so that a recorded step follows them. A length of 0 is padding."""
        return GpuPlan.decoding(block_tables, lengths, block_size)

    def paged_attention(
        self,
        query: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        plan: AttentionPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Sequences of one query split their keys; the others are tiled over their queries."""
        if not isinstance(plan, GpuPlan):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        return paged_attention(
            query, key_pool, value_pool, plan, spec, self.flash, ahead=self._programmatic
        )

    def rope_store_kv(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        slots: Tensor,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """One kernel; a negative slot is passed over."""
        return rope_store_kv(qkv, cos, sin, key_pool, value_pool, slots, norms)

    def add_rms_norm_quantize(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Float8Rows, Tensor]:
        """One kernel; the sum is written into `residual`."""
        if not residual.is_contiguous():
            residual = residual.contiguous()
        return rms_norm_quantize(
            x, weight, eps, offset, residual=residual, ahead=self._programmatic
        ), residual

    def gated_quantize(self, gate_up: Tensor, activation: str) -> Float8Rows:
        """One kernel."""
        return gated_quantize(gate_up, activation, ahead=self._programmatic)

    def all_reduce_add_rms_norm(
        self,
        peers: PeerBuffers,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """`add_rms_norm` of the sum of all ranks' first len(residual) rows, in rank order.

        The sum is written into residual. A buffer may be written again once a later call on
        another buffer has begun: two in turn are enough.
        """
        return all_reduce_add_rms_norm(
            peers, residual, weight, eps, offset, ahead=self._programmatic
        ), residual

    def all_reduce_add_rms_norm_quantize(
        self,
        peers: PeerBuffers,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Float8Rows, Tensor]:
        """As `all_reduce_add_rms_norm`, rounded."""
        rows = all_reduce_add_rms_norm_quantize(
            peers, residual, weight, eps, offset, ahead=self._programmatic
        )
        return rows, residual

    def sample(
        self, logits: Tensor, temperatures: Tensor, stems: Tensor, positions: Tensor, first_id: int
    ) -> Tensor:
        """The best token of this slice for each row: float64 [n, 4] = (id, value, raw, broken).

        logits [n, m] of the tokens from `first_id` on, any floating dtype; temperatures float64
        [n], 0 = greedy; stems int64 [n] from `sampling.stem`; positions int64 [n] of the new
        tokens, from the prompt's start. The noise is that of workers' sampling, bit for bit but
        for the logarithms' last place. Ties go to the lowest id; a row with NaN or infinite
        logits has broken = 1.
        """
        return sample(logits, temperatures, stems, positions, first_id)

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
        """One pass over the logits; chunks are added in order."""
        return tail_sums(logits, tops, warmth, lowest, step, weighted=weighted)

    def merge_winners(self, gathered: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The winner over the ranks' `sample` results: [size, n, 4] -> [n, 4]; equal on all.

        tokens int64 [n], if given, takes the winners' ids: the next step's input.
        """
        return merge(gathered, tokens)
