"""The compiled CPU backend: the library's kernels behind the interface.

What the library has no code for (float16, float64, very wide groups) is done by the torch
backend, from which this one inherits.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from phalanx.kernels.fused import PlainStack, Reduction, StackProgram
from phalanx.kernels.interface import AttentionPlan, AttentionSpec, PackedLinear, SequenceSpan

from .backend import CpuBackend
from .library import ACTIVATIONS, MOST_GROUP, TYPES, Attention, load_library
from .linear import NativeInt8Linear, NativeLinear
from .panels import as_panels, block_tokens, from_panels, in_panels, pool_type, row_width
from .spans import NativePlan
from .stack import NativeStack, can_run
from .stored import NativeStorage


class NativeBackend(CpuBackend):
    """Kernels in C++ for the processor at hand. Raises `OSError` where they cannot run."""

    name = "cpu-native"

    def __init__(self, threads: int | None = None, isa: str = "", compact: bool = True) -> None:
        """`threads` of the team, torch's number by default; `isa` forces an instruction set.

        compact: keep weights of bfloat16 in 12 bits.
        """
        self.library, self.compact = load_library(), compact
        self.threads = threads or torch.get_num_threads()
        handle: int | None = self.library.phx_open(isa.encode(), self.threads)
        if handle is None:
            raise OSError(f"this processor has no {isa!r}")
        self.handle = handle
        self.isa: str = self.library.phx_isa(handle).decode()
        self._close = weakref.finalize(self, self.library.phx_close, handle)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Panels of 32 outputs (native/matmul.inl)."""
        if weight.dtype not in TYPES:
            return super().pack_linear(weight, bias)
        return NativeLinear(self, weight, bias)

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The same panels, of bytes."""
        if weight.dtype not in TYPES:
            return super().pack_linear_int8(weight, bias)
        return NativeInt8Linear(self, weight, bias)

    @property
    def storage(self) -> NativeStorage:
        """Packed weights in files."""
        return NativeStorage(self)

    def argmax(self, x: Tensor) -> Tensor:
        """The first largest of each row of float32 x [n, m], m >= 1, without NaN: int64 [n]."""
        x = x.contiguous()
        columns = torch.empty(len(x), dtype=torch.int64)
        self.library.phx_argmax(self.handle, x.data_ptr(), len(x), x.shape[1], columns.data_ptr())
        return columns

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """One pass for the sum of squares, one for the scaling."""
        if not _row_weight(x, weight):
            return super().rms_norm(x, weight, eps, offset)
        return self._rms_norm(None, x.contiguous(), weight, eps, offset)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Overwrites `residual`."""
        if not _row_weight(x, weight) or residual.dtype is not x.dtype:
            return super().add_rms_norm(x, residual, weight, eps, offset)
        residual = residual.contiguous()
        return self._rms_norm(x.contiguous(), residual, weight, eps, offset), residual

    def _rms_norm(
        self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, offset: float
    ) -> Tensor:
        output = torch.empty_like(residual)
        size = residual.shape[-1]
        self.library.phx_rms_norm(
            self.handle,
            None if x is None else x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            TYPES[residual.dtype],
            offset,
            eps,
            residual.numel() // max(size, 1),
            size,
            output.data_ptr(),
        )
        return output

    def rope(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Reads the heads where the projection left them."""
        dense = heads.stride(-1) == 1 and heads.stride(1) == heads.shape[2]
        if heads.dtype not in TYPES or cos.dtype is not heads.dtype or not dense:
            return super().rope(heads, cos, sin)
        tokens, count, dim = heads.shape
        output = torch.empty(heads.shape, dtype=heads.dtype)
        self.library.phx_rope(
            self.handle,
            heads.data_ptr(),
            heads.stride(0),
            cos.contiguous().data_ptr(),
            sin.contiguous().data_ptr(),
            TYPES[heads.dtype],
            tokens,
            count,
            cos.shape[-1],
            dim,
            output.data_ptr(),
        )
        return output

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """One pass."""
        if gate_up.dtype not in TYPES:
            return super().silu_mul(gate_up)
        return self._activated(gate_up, "silu", gated=True)

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """One pass."""
        if gate_up.dtype not in TYPES:
            return super().gated(gate_up, activation)
        return self._activated(gate_up, activation, gated=True)

    def activate(self, x: Tensor, activation: str) -> Tensor:
        """One pass."""
        if x.dtype not in TYPES or x.dim() != 2:
            return super().activate(x, activation)
        return self._activated(x, activation, gated=False)

    def _activated(self, x: Tensor, activation: str, *, gated: bool) -> Tensor:
        x = x.contiguous()
        rows, size = len(x), x.shape[-1] // (2 if gated else 1)
        output = x.new_empty(rows, size)
        self.library.phx_activate(
            self.handle,
            x.data_ptr(),
            gated,
            ACTIVATIONS[activation],
            TYPES[x.dtype],
            rows,
            size,
            output.data_ptr(),
        )
        return output

    def store_kv(
        self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor
    ) -> None:
        """Whole rows, straight from the projection."""
        if in_panels(key_pool):
            key, value = _side_by_side(key.bfloat16()), _side_by_side(value.bfloat16())
        known = key.dtype in TYPES and pool_type(key_pool) is not None
        if not known or not (_dense(key) and _dense(value)) or not key_pool.is_contiguous():
            return super().store_kv(key, value, key_pool, value_pool, slots)
        tokens, kv_heads, dim = key.shape
        head_stride = key_pool.stride(0)
        block_size = block_tokens(key_pool)
        for source, pool in ((key, key_pool), (value, value_pool)):
            self.library.phx_store(
                self.handle,
                source.data_ptr(),
                source.stride(0),
                TYPES[source.dtype],
                pool.data_ptr(),
                pool_type(pool),
                head_stride,
                block_size,
                source is key,
                slots.data_ptr(),
                tokens,
                kv_heads,
                dim,
            )
        return None

    def arrange_pools(
        self, keys: Tensor, values: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """In panels, if what is multiplied with them is bfloat16 as well."""
        return as_panels(keys, values) if dtype is torch.bfloat16 else (keys, values)

    def plan_attention(self, spans: Sequence[SequenceSpan], block_size: int) -> AttentionPlan:
        """The spans as arrays."""
        return NativePlan.of(spans, block_size)

    def paged_attention(
        self,
        query: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        plan: AttentionPlan,
        spec: AttentionSpec,
    ) -> Tensor:
        """Pages are read in place (native/attention.inl)."""
        if not isinstance(plan, NativePlan):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        kv_heads, heads = key_pool.shape[0], query.shape[1]
        fits = query.dtype is torch.bfloat16 or not in_panels(key_pool)
        known = query.dtype in TYPES and pool_type(key_pool) is not None and fits
        if not known or heads > MOST_GROUP * kv_heads or not _dense(query):
            if in_panels(key_pool):
                key_pool, value_pool = from_panels(key_pool, value_pool)
            torch_plan = super().plan_attention(plan.spans, plan.block_size)
            return super().paged_attention(query, key_pool, value_pool, torch_plan, spec)
        output = torch.empty(query.shape, dtype=query.dtype)
        call = Attention(
            query=query.data_ptr(),
            output=output.data_ptr(),
            query_stride=query.stride(0),
            output_stride=output.stride(0),
            heads=heads,
            kv_heads=kv_heads,
            dim=query.shape[2],
            type=TYPES[query.dtype],
            pool_type=pool_type(key_pool),
            keys=key_pool.data_ptr(),
            values=value_pool.data_ptr(),
            head_stride=key_pool.stride(0),
            block_size=plan.block_size,
            row=row_width(key_pool),
            scale=spec.scale,
            softcap=spec.softcap,
            window=spec.window,
            slopes=_pointer(spec.alibi_slopes),
            sinks=_pointer(spec.sinks),
        )
        self.library.phx_attention(self.handle, ctypes.byref(call), ctypes.byref(plan.table))
        return output

    def fuse(self, stack: PlainStack, reduction: Reduction) -> StackProgram | None:
        """One call a step (native/decoder.h)."""
        return NativeStack(self, stack, reduction) if can_run(stack, reduction) else None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _row_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether the library knows the dtype, and `weight` is one row for all of x."""
    return x.dtype in TYPES and weight.dtype is x.dtype and weight.dim() == 1


def _side_by_side(heads: Tensor) -> Tensor:
    return heads if _dense(heads) else heads.contiguous()


def _dense(heads: Tensor) -> bool:
    """Whether the heads of one token [T, n, D] stand side by side."""
    return heads.stride(2) == 1 and heads.stride(1) == heads.shape[2]
