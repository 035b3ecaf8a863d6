"""A stack of plain layers as one call of the library (native/decoder.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phalanx.kernels.fused import NormWeights, PeerLost, PlainLayer, PlainStack, Reduction
from phalanx.kernels.interface import AttentionPlan, PackedLinear

from .library import (
    ACTIVATIONS,
    MOST_ANGLES,
    MOST_DIM,
    MOST_GROUP,
    MOST_RANKS,
    POOL_TYPES,
    TYPES,
    Angles,
    Layer,
    Segment,
    Stack,
    Step,
)
from .library import NormWeights as NativeNorm
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
        and stack.activation in ACTIVATIONS
        and stack.head_dim <= MOST_DIM
        and stack.num_heads <= MOST_GROUP * stack.num_kv_heads
        and (segment is None or segment.size <= MOST_RANKS)
    )


def _is_known(layer: PlainLayer, first: PlainLayer) -> bool:
    """Whether the library knows the layer's types, and they are those of the first."""
    linears = (layer.qkv, layer.output, layer.up, layer.down)
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
    """Descriptors are built once; a step is one call, or one a part where Python reduces."""

    def __init__(self, backend: NativeBackend, stack: PlainStack, reduction: Reduction) -> None:
        self._backend, self._plain, self._reduce = backend, stack, reduction.function
        first = stack.layers[0]
        if not isinstance(first.qkv, PackedWeight):
            raise TypeError("the layers were packed by another backend")
        self._dtype = first.qkv.dtype
        self._kept: list[Tensor] = []  # what the descriptors point to
        self._layers = (Layer * len(stack.layers))(*map(self._layer, stack.layers))
        self._stack = self._descriptor(stack)
        # parts of a layer, each of which ends in a sum over the ranks (parts_of in decoder.h)
        self._projects = stack.head_width is not None
        self._parts = self._projects + (1 if stack.parallel else 2)
        self._segment: Segment | None = None
        if reduction.segment is not None:
            shared = reduction.segment
            self._segment = Segment(
                shared.address, shared.rank, shared.size, shared.slot_bytes, shared.timeout_s
            )
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._sums = torch.empty(0)

    def _descriptor(self, stack: PlainStack) -> Stack:
        pool, spec, width = stack.layers[0].key_pool, stack.layers[0].attention, stack.head_width
        norm = stack.layers[0].query_norm
        return Stack(
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
            residual_scale=stack.residual_scale,
            clip=stack.clip,
            layer_norm=stack.norm == "layer",
            parallel=stack.parallel,
            gated=stack.gated,
            activation=ACTIVATIONS[stack.activation],
            head_norm_stride=stack.head_dim if norm is not None and norm.dim() == 2 else 0,
            over_width=width is not None,
            counts_keys=width is not None and width.counts_keys,
            query_width=width.query if width else 0,
            key_width=width.key if width else 0,
            layers=ctypes.cast(self._layers, c_void_p),
            final_norm=self._norm(stack.final_norm),
        )

    def _norm(self, norm: NormWeights | None) -> NativeNorm:
        if norm is None:
            return NativeNorm(None, None)
        weight = torch.ones(self._plain.hidden_size) if norm.weight is None else norm.weight
        offset = 0.0 if norm.weight is None else self._plain.norm_offset
        return NativeNorm(self._wide(weight, offset), self._wide(norm.bias))

    def _wide(self, weight: Tensor | None, offset: float = 0.0) -> int | None:
        if weight is None:
            return None
        self._kept.append((weight.float() + offset).contiguous())
        return self._kept[-1].data_ptr()

    def _layer(self, layer: PlainLayer) -> Layer:
        spec, offset = layer.attention, self._plain.norm_offset
        linears = (layer.qkv, layer.output, layer.up, layer.down)
        self._kept += [layer.key_pool, layer.value_pool]
        norms = (layer.input_norm, layer.attention_norm, layer.post_norm, layer.mlp_norm)
        # a norm over the width of all heads knows no offset
        head_offset = 0.0 if self._plain.head_width else offset
        heads = (self._wide(norm, head_offset) for norm in (layer.query_norm, layer.key_norm))
        return Layer(
            *map(self._norm, norms),
            *(NativeNorm(weight, None) for weight in heads),
            *(linear.handle for linear in linears if isinstance(linear, PackedWeight)),
            layer.key_pool.data_ptr(),
            layer.value_pool.data_ptr(),
            spec.window,
            *(self._wide(bias) for bias in (spec.alibi_slopes, spec.sinks)),
            0 if layer.rotation is None else 1 + layer.rotation,
        )

    def __call__(
        self,
        x: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        slots: Tensor,
        plan: AttentionPlan,
        rows: Tensor,
    ) -> Tensor:
        """See `StackProgram`."""
        if not isinstance(plan, NativePlan):
            raise TypeError(f"plan of another backend: {type(plan).__name__}")
        tokens, hidden_size = x.shape
        turns = [tuple(each.to(self._dtype).contiguous() for each in pair) for pair in angles]
        x = x.to(self._dtype if x.dtype not in TYPES else x.dtype).contiguous()
        delta, squares = self._buffers(tokens)
        ends = self._plain.final_norm is not None
        dtype = self._dtype if ends else torch.float32
        hidden = torch.empty(len(rows), hidden_size, dtype=dtype)
        step = Step(
            tokens=tokens,
            x=x.data_ptr(),
            x_type=TYPES[x.dtype],
            angles=(Angles * MOST_ANGLES)(
                *(Angles(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]) for cos, sin in turns)
            ),
            slots=slots.data_ptr(),
            spans=ctypes.cast(ctypes.pointer(plan.table), c_void_p),
            rows=rows.data_ptr(),
            num_rows=len(rows),
            hidden=hidden.data_ptr(),
            delta=delta.data_ptr(),
            squares=squares.data_ptr(),
            memory=self._memory.data_ptr(),
        )
        parts = self._parts * len(self._layers)
        if self._reduce is None:
            self._run(step, 0, parts + 1)
            return hidden
        for part in range(parts):
            self._run(step, part, part + 1)
            summed = squares if self._projects and part % self._parts == 0 else delta
            total = self._reduce(summed)
            if total is not summed:
                summed.copy_(total)
        self._run(step, parts, parts + 1)
        return hidden

    def _run(self, step: Step, first: int, last: int) -> None:
        backend, segment = self._backend, self._segment
        shared = None if segment is None else byref(segment)
        lost = backend.library.phx_run_stack(
            backend.handle, byref(self._stack), byref(step), shared, first, last
        )
        if lost:
            raise PeerLost(lost - 1)

    def _buffers(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Room for a step; what ranks sum: what a part adds, [T, hidden], and squares [T, 2]."""
        need = self._backend.library.phx_stack_bytes(byref(self._stack), tokens)
        if need > len(self._memory):
            self._memory = torch.empty(need, dtype=torch.uint8)
        size = tokens * self._plain.hidden_size
        end = size + 2 * tokens
        if end > len(self._sums):
            self._sums = torch.empty(end)
        return self._sums[:size].view(tokens, -1), self._sums[size:end].view(tokens, 2)
