"""One layer of the decoder: how attention and feed-forward add to the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import RankCut
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.batch import Batch
from phalanx.workers.cache import LayerCache
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import NO_LAYOUTS, PLAIN, Layouts
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .attention import Attention
from .experts import ExpertsMLP
from .latent import LatentAttention
from .linear import ColumnParallelLinear, RowParallelLinear, Rows
from .mlp import GatedMLP, NoMLP, PlainMLP
from .norm import Norm, Normalize
from .state import ChannelStates, HeadStates, StateSpace

_NORMS = {
    "pre": ("input_norm", "post_norm"),
    "sandwich": ("input_norm", "attention_norm", "post_norm", "mlp_norm"),
    "post": ("attention_norm", "mlp_norm"),
    "parallel": ("input_norm",),
    "parallel_two": ("input_norm", "post_norm"),
    "single": ("input_norm",),
}
AnyAttention = Attention | LatentAttention | StateSpace
AnyMLP = GatedMLP | PlainMLP | ExpertsMLP | NoMLP


class DecoderLayer:
    """Attention and feed-forward in the order of `DecoderSpec.block`.

    The residual sum is carried beside the hidden states, so that adding and norming are one step.
    """

    def __init__(
        self,
        model: DecoderSpec,
        part: RankCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layer: int = 0,
        layouts: Layouts = NO_LAYOUTS,
        deferred: bool = False,
    ) -> None:
        """deferred: the next norm sums over the ranks what a block gives, the last block's too;
        for `block` "pre" with a residual scale of 1."""
        self._group, self._norm = group, Normalize(model, backend, group)
        self._add = self._norm.add_sum_rows if deferred else self._norm.add_rows
        self._add_input = self._add if layer else self._norm.add_rows
        self._scale = model.residual_scale
        self._norms = {
            role: Norm(
                getattr(names, role),
                model.hidden_size,
                dtype,
                device,
                model=model,
                layout=layouts.get(role, PLAIN),
            )
            for role in _NORMS[model.block]
        }
        place = (group, backend, dtype, device)
        reduce = model.block not in ("parallel", "parallel_two") and not deferred
        self.attention = _attention(
            model, part, names, *place, layer=layer, layouts=layouts, reduce=reduce
        )
        self.mlp = _mlp(model, part, names, *place, layer=layer, layouts=layouts, reduce=reduce)
        self._run = {
            "pre": self._pre,
            "sandwich": self._sandwich,
            "post": self._post,
            "parallel": self._parallel,
            "parallel_two": self._parallel,
            "single": self._single,
        }[model.block]

    @property
    def norms(self) -> dict[str, Norm]:
        """The norms of hidden states, by role."""
        return self._norms

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The layer's linear layers, in the order of their use."""
        return [*self.attention.linears, *self.mlp.linears]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill."""
        pieces = [piece for norm in self._norms.values() for piece in norm.pieces]
        pieces += self.attention.pieces + self.mlp.pieces
        return pieces + [piece for linear in self.linears for piece in linear.pieces]

    def __call__(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """(block output [T, hidden], residual before it is added)."""
        return self._run(x, residual, batch, cache)

    @property
    def _attention_takes_float8(self) -> bool:
        return isinstance(self.attention, Attention) and self.attention.takes_float8

    @property
    def _mlp_takes_float8(self) -> bool:
        return isinstance(self.mlp, GatedMLP | PlainMLP) and self.mlp.takes_float8

    def _attend(self, rows: Rows, batch: Batch, cache: LayerCache) -> Tensor:
        if isinstance(rows, Tensor) or isinstance(self.attention, Attention):
            return self.attention(rows, batch, cache)  # type: ignore[arg-type]
        raise TypeError("rounded inputs of an attention that does not take them")

    def _feed(self, rows: Rows) -> Tensor:
        if isinstance(rows, Tensor) or isinstance(self.mlp, GatedMLP | PlainMLP):
            return self.mlp(rows)  # type: ignore[arg-type]
        raise TypeError("rounded inputs of a feed-forward block that does not take them")

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._scale == 1.0 else x * self._scale

    def _pre(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        norms, rounded = self._norms, self._attention_takes_float8
        rows, residual = self._add_input(x, residual, norms["input_norm"], rounded=rounded)
        x = self._scaled(self._attend(rows, batch, cache))
        rounded = self._mlp_takes_float8
        rows, residual = self._add(x, residual, norms["post_norm"], rounded=rounded)
        del x  # its memory is needed
        return self._scaled(self._feed(rows)), residual

    def _sandwich(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        norms, add = self._norms, self._norm.add_rows
        rounded = self._attention_takes_float8
        rows, residual = add(x, residual, norms["input_norm"], rounded=rounded)
        x = self._norm(self._attend(rows, batch, cache), norms["attention_norm"])
        rounded = self._mlp_takes_float8
        rows, residual = add(self._scaled(x), residual, norms["post_norm"], rounded=rounded)
        del x
        return self._scaled(self._norm(self._feed(rows), norms["mlp_norm"])), residual

    def _post(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        x = x + residual
        attended = self._norm(self.attention(x, batch, cache), self._norms["attention_norm"])
        residual = x + self._scaled(attended)
        return self._scaled(self._norm(self.mlp(residual), self._norms["mlp_norm"])), residual

    def _parallel(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        x, residual = self._norm.add(x, residual, self._norms["input_norm"])
        other = self._norm(residual, self._norms["post_norm"]) if "post_norm" in self._norms else x
        total = self._group.all_reduce(self.attention(x, batch, cache) + self.mlp(other))
        return self._scaled(total), residual

    def _single(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        x, residual = self._norm.add(x, residual, self._norms["input_norm"])
        return self._scaled(self.attention(x, batch, cache)), residual


def _attention(
    model: DecoderSpec,
    part: RankCut,
    names: LayerNames,
    group: TensorParallel,
    backend: KernelBackend,
    dtype: torch.dtype,
    device: torch.device,
    *,
    layer: int,
    layouts: Layouts,
    reduce: bool,
) -> AnyAttention:
    place = (group, backend, dtype, device)
    if model.state is not None and part.state is not None and model.has_state(layer):
        states = HeadStates if model.state.heads else ChannelStates
        return states(model, model.state, part.state, names, *place, layouts=layouts, reduce=reduce)
    kind = Attention if model.latent is None else LatentAttention
    return kind(model, part.heads, names, *place, layer=layer, layouts=layouts, reduce=reduce)


def _mlp(
    model: DecoderSpec,
    part: RankCut,
    names: LayerNames,
    group: TensorParallel,
    backend: KernelBackend,
    dtype: torch.dtype,
    device: torch.device,
    *,
    layer: int,
    layouts: Layouts,
    reduce: bool,
) -> AnyMLP:
    place = (group, backend, dtype, device)
    if model.block == "single":
        return NoMLP()
    if model.experts is not None and model.has_experts(layer):
        return ExpertsMLP(model, model.experts, part, names, *place, layouts=layouts, reduce=reduce)
    kind = GatedMLP if model.gated_mlp else PlainMLP
    return kind(model, part.mlp, names, *place, layouts=layouts, reduce=reduce)
