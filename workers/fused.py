"""Handing a decoder's layers to a backend that can run them all in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from phalanx.kernels.fused import (
    FusingBackend,
    HeadWidth,
    NormWeights,
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
from .layers.mlp import GatedMLP, PlainMLP
from .layers.norm import Norm
from .parallel import TensorParallel


@runtime_checkable
class HasSegment(Protocol):
    """A group whose sums go through shared memory."""

    @property
    def segment(self) -> SharedSegment:
        """Where that memory is."""


def is_plain(model: DecoderSpec) -> bool:
    """Whether every layer is a `PlainLayer`: attention over heads and a dense block."""
    plain_norm = model.norm == "layer" or (model.norm_affine and not model.norm_bias)
    return (
        plain_norm
        and model.block != "single"
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
        program = backend.fuse(_stack(model, part, layers, final_norm, cache), _reduction(group))
        return None if program is None else cls(program, ends=final_norm is not None)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """Embeddings, or what the stage before gives, [T, hidden] -> final hidden states of the
        rows that need logits; or, of all rows, what the next stage takes."""
        rows = batch.logit_rows if self._ends else torch.arange(len(x))
        angles = [(batch.cos, batch.sin), *([batch.local] if batch.local else [])]
        try:
            return self._program(x, angles, batch.slots, batch.attention, rows)
        except PeerLost as error:
            raise GroupLost(str(error)) from None


def _stack(
    model: DecoderSpec,
    part: RankCut,
    layers: Sequence[DecoderLayer],
    final_norm: Norm | None,
    cache: Sequence[LayerCache],
) -> PlainStack:
    return PlainStack(
        layers=[_plain(layer, pages) for layer, pages in zip(layers, cache, strict=True)],
        final_norm=_weights(final_norm),
        norm_eps=model.norm_eps,
        norm_offset=model.norm_offset,
        hidden_size=model.hidden_size,
        num_heads=part.heads.query.size,
        num_kv_heads=part.heads.kv.size,
        head_dim=model.head_dim,
        intermediate_size=part.mlp.size,
        norm=model.norm,
        parallel=model.block in ("parallel", "parallel_two"),
        gated=model.gated_mlp,
        activation=model.activation,
        residual_scale=model.residual_scale,
        clip=model.qkv_clip,
        head_width=_head_width(model, part) if model.qk_norm == "width" else None,
    )


def _head_width(model: DecoderSpec, part: RankCut) -> HeadWidth:
    heads = part.heads
    return HeadWidth(
        query=model.num_heads * model.head_dim,
        key=model.num_kv_heads * model.head_dim,
        counts_keys=heads.query.start * model.num_kv_heads == heads.kv.start * model.num_heads,
    )


def _weights(norm: Norm | None) -> NormWeights | None:
    return None if norm is None else NormWeights(norm.weight, norm.bias)


def _plain(layer: DecoderLayer, pages: LayerCache) -> PlainLayer:
    attention, mlp, norms = layer.attention, layer.mlp, layer.norms
    if not isinstance(attention, Attention) or not isinstance(mlp, GatedMLP | PlainMLP):
        raise TypeError("not a plain layer")
    query_norm, key_norm = attention.head_norms
    return PlainLayer(
        input_norm=_weights(norms.get("input_norm")),
        qkv=attention.qkv.packed,
        attention=attention.spec,
        output=attention.output.packed,
        attention_norm=_weights(norms.get("attention_norm")),
        post_norm=_weights(norms.get("post_norm")),
        up=mlp.into.packed,
        down=mlp.down.packed,
        mlp_norm=_weights(norms.get("mlp_norm")),
        key_pool=pages.key,
        value_pool=pages.value,
        query_norm=query_norm,
        key_norm=key_norm,
        rotation=attention.rotation,
    )


def _reduction(group: TensorParallel) -> Reduction:
    if group.size == 1:
        return Reduction()
    if isinstance(group, HasSegment):
        return Reduction(segment=group.segment)
    return Reduction(function=group.all_reduce)
