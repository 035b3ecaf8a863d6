"""Handing a decoder's layers to a backend that can run them all in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from phalanx.kernels.fused import (
    FusingBackend,
    PeerLost,
    PlainLayer,
    PlainStack,
    Reduction,
    SharedSegment,
    StackProgram,
)
from phalanx.kernels.interface import KernelBackend
from phalanx.protos.errors import GroupLost
from phalanx.protos.shards import RankCut
from phalanx.protos.specs import DecoderSpec

from .batch import Batch
from .cache import LayerCache
from .layers.attention import Attention
from .layers.block import DecoderLayer
from .layers.mlp import GatedMLP
from .layers.norm import Norm
from .parallel import TensorParallel


@runtime_checkable
class HasSegment(Protocol):
    """A group whose sums go through shared memory."""

    @property
    def segment(self) -> SharedSegment:
        """Where that memory is."""


def is_plain(model: DecoderSpec) -> bool:
    """Whether every layer is a `PlainLayer`."""
    return (
        model.block == "pre"
        and model.norm == "rms"
        and model.norm_affine
        and not model.norm_bias
        and model.qk_norm in ("none", "head")
        and model.rope is not None
        and model.local_rope is None
        and not model.unrotated
        and model.residual_scale == 1.0
        and not model.qkv_clip
        and model.gated_mlp
        and model.activation == "silu"
        and model.experts is None
        and model.latent is None
        and model.state is None
    )


class FusedLayers:
    """All layers of a stage, in the last one the final norm too, as one call."""

    def __init__(self, program: StackProgram, *, ends: bool) -> None:
        self._program, self._ends = program, ends

    @classmethod
    def of(
        cls,
        model: DecoderSpec,
        part: RankCut,
        layers: Sequence[DecoderLayer],
        final_norm: Norm | None,
        cache: Sequence[LayerCache],
        group: TensorParallel,
        backend: KernelBackend,
    ) -> FusedLayers | None:
        """None where the model is not plain or the backend cannot. Only the last stage has a
        final norm."""
        if not is_plain(model) or not isinstance(backend, FusingBackend) or not layers:
            return None
        stack = PlainStack(
            layers=[_plain(layer, pages) for layer, pages in zip(layers, cache, strict=True)],
            final_norm=None if final_norm is None else final_norm.weight,
            norm_eps=model.norm_eps,
            norm_offset=model.norm_offset,
            hidden_size=model.hidden_size,
            num_heads=part.heads.query.size,
            num_kv_heads=part.heads.kv.size,
            head_dim=model.head_dim,
            intermediate_size=part.mlp.size,
        )
        program = backend.fuse(stack, _reduction(group))
        return None if program is None else cls(program, ends=final_norm is not None)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Embeddings, or what the stage before gives, [T, hidden] -> final hidden states of the
        rows that need logits; or, of all rows, what the next stage takes."""
        rows = batch.logit_rows if self._ends else torch.arange(len(x))
        try:
            return self._program(x, batch.cos, batch.sin, batch.slots, batch.attention, rows)
        except PeerLost as error:
            raise GroupLost(str(error)) from None


def _plain(layer: DecoderLayer, pages: LayerCache) -> PlainLayer:
    attention, mlp, norms = layer.attention, layer.mlp, layer.norms
    input_norm, post_norm = norms["input_norm"].weight, norms["post_norm"].weight
    if not isinstance(attention, Attention) or not isinstance(mlp, GatedMLP):
        raise TypeError("not a plain layer")
    if input_norm is None or post_norm is None:
        raise TypeError("not a plain layer")
    query_norm, key_norm = attention.head_norms
    return PlainLayer(
        input_norm=input_norm,
        qkv=attention.qkv.packed,
        attention=attention.spec,
        output=attention.output.packed,
        post_norm=post_norm,
        gate_up=mlp.gate_up.packed,
        down=mlp.down.packed,
        key_pool=pages.key,
        value_pool=pages.value,
        query_norm=query_norm,
        key_norm=key_norm,
    )


def _reduction(group: TensorParallel) -> Reduction:
    if group.size == 1:
        return Reduction()
    if isinstance(group, HasSegment):
        return Reduction(segment=group.segment)
    return Reduction(function=group.all_reduce)
