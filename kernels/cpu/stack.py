"""A stack of plain layers as one call of the library (native/decoder.h)."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phalanx.kernels.fused import PeerLost, PlainLayer, PlainStack, Reduction
from phalanx.kernels.interface import AttentionPlan, PackedLinear

from .library import (
    MOST_DIM,
    MOST_GROUP,
    MOST_RANKS,
    POOL_TYPES,
    TYPES,
    Layer,
    Segment,
    Stack,
    Step,
)
from .linear import PackedWeight
from .panels import block_tokens, pool_type, row_width
from .spans import NativePlan

if TYPE_CHECKING:
    from .native_backend import NativeBackend


def can_run(stack: PlainStack, reduction: Reduction) -> bool:
    """Whether the library has code for all of it."""
    layer = stack.layers[0]
    segment = reduction.segment
    return (
        all(_is_known(each, layer) for each in stack.layers)
        and len({(each.attention.scale, each.attention.softcap) for each in stack.layers}) == 1
        and stack.hidden_size % 2 == 0
        and stack.head_dim % 2 == 0
        and stack.head_dim <= MOST_DIM
        and stack.num_heads <= MOST_GROUP * stack.num_kv_heads
        and (segment is None or segment.size <= MOST_RANKS)
    )


def _is_known(layer: PlainLayer, first: PlainLayer) -> bool:
    """Whether the library knows the layer's types, and they are those of the first."""
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    pools, pool, model = (layer.key_pool, layer.value_pool), first.key_pool, first.qkv
    return (
        isinstance(model, PackedWeight)
        and all(isinstance(linear, PackedWeight) for linear in linears)
        and all(_types(linear) == _types(model) for linear in linears)
        and all(each.dtype in POOL_TYPES and each.is_contiguous() for each in pools)
        and all(each.dtype is pool.dtype and each.dim() == pool.dim() for each in pools)
        and all(each.stride(1) == pool.stride(1) for each in pools)
    )


def _types(linear: PackedLinear) -> tuple[torch.dtype, int] | None:
    return (linear.dtype, linear.packed) if isinstance(linear, PackedWeight) else None


class NativeStack:
    """Descriptors are built once; a step is one call, or one a half layer where Python reduces."""

    def __init__(self, backend: NativeBackend, stack: PlainStack, reduction: Reduction) -> None:
        self._backend, self._plain, self._reduce = backend, stack, reduction.function
        first = stack.layers[0]
        if not isinstance(first.qkv, PackedWeight):
            raise TypeError("the layers were packed by another backend")
        self._dtype = first.qkv.dtype
        self._kept: list[Tensor] = []  # what the descriptors point to
        self._layers = (Layer * len(stack.layers))(*map(self._layer, stack.layers))
        pool, spec = first.key_pool, first.attention
        self._stack = Stack(
            count=len(stack.layers),
            hidden=stack.hidden_size,
            heads=stack.num_heads,
            kv_heads=stack.num_kv_heads,
            dim=stack.head_dim,
            inner=stack.intermediate_size,
            type=TYPES[self._dtype],
            pool_type=pool_type(pool),
            head_stride=pool.stride(0),
            block_size=block_tokens(pool),
            row=row_width(pool),
            scale=spec.scale,
            softcap=spec.softcap,
            eps=stack.norm_eps,
            layers=ctypes.cast(self._layers, c_void_p),
            final_norm=self._wide(stack.final_norm, stack.norm_offset),
        )
        self._segment: Segment | None = None
        if reduction.segment is not None:
            shared = reduction.segment
            self._segment = Segment(
                shared.address, shared.rank, shared.size, shared.slot_bytes, shared.timeout_s
            )
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._delta = torch.empty(0)

    def _wide(self, weight: Tensor | None, offset: float) -> int | None:
        if weight is None:
            return None
        self._kept.append((weight.float() + offset).contiguous())
        return self._kept[-1].data_ptr()

    def _layer(self, layer: PlainLayer) -> Layer:
        offset, spec = self._plain.norm_offset, layer.attention
        linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
        self._kept += [layer.key_pool, layer.value_pool]
        norms = (layer.input_norm, layer.post_norm, layer.query_norm, layer.key_norm)
        biases = (spec.alibi_slopes, spec.sinks)
        return Layer(
            *(self._wide(norm, offset) for norm in norms),
            *(linear.handle for linear in linears if isinstance(linear, PackedWeight)),
            layer.key_pool.data_ptr(),
            layer.value_pool.data_ptr(),
            spec.window,
            *(self._wide(bias, 0.0) for bias in biases),
        )

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        plan: AttentionPlan,
        rows: Tensor,
    ) -> Tensor:
        """See `StackProgram`."""
        if not isinstance(plan, NativePlan):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        tokens, hidden_size = x.shape
        cos, sin = (each.to(self._dtype).contiguous() for each in (cos, sin))
        x = x.to(self._dtype if x.dtype not in TYPES else x.dtype).contiguous()
        delta = self._buffers(tokens)
        ends = self._plain.final_norm is not None
        dtype = self._dtype if ends else torch.float32
        hidden = torch.empty(len(rows), hidden_size, dtype=dtype)
        step = Step(
            tokens=tokens,
            x=x.data_ptr(),
            x_type=TYPES[x.dtype],
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            half=cos.shape[-1],
            slots=slots.data_ptr(),
            spans=ctypes.cast(ctypes.pointer(plan.table), c_void_p),
            rows=rows.data_ptr(),
            num_rows=len(rows),
            hidden=hidden.data_ptr(),
            delta=delta.data_ptr(),
            memory=self._memory.data_ptr(),
        )
        halves = 2 * len(self._layers)
        if self._reduce is None:
            self._run(step, 0, halves + 1)
            return hidden
        for half in range(halves):
            self._run(step, half, half + 1)
            total = self._reduce(delta)
            if total is not delta:
                delta.copy_(total)
        self._run(step, halves, halves + 1)
        return hidden

    def _run(self, step: Step, first: int, last: int) -> None:
        backend, segment = self._backend, self._segment
        shared = None if segment is None else byref(segment)
        lost = backend.library.phx_run_stack(
            backend.handle, byref(self._stack), byref(step), shared, first, last
        )
        if lost:
            raise PeerLost(lost - 1)

    def _buffers(self, tokens: int) -> Tensor:
        """Room for a step; what the last half layer adds, [T, hidden]."""
        need = self._backend.library.phx_stack_bytes(byref(self._stack), tokens)
        if need > len(self._memory):
            self._memory = torch.empty(need, dtype=torch.uint8)
        size = tokens * self._plain.hidden_size
        if size > len(self._delta):
            self._delta = torch.empty(size)
        return self._delta[:size].view(tokens, -1)
