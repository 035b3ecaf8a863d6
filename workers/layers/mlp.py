"""The feed-forward block, gated or plain, its columns divided among the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.float8 import Float8Backend
from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import Span
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import NO_LAYOUTS, PLAIN, Layouts
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .linear import ColumnParallelLinear, Output, RowParallelLinear, Rows


class _FeedForward:
    """down(act(...)): x [T, hidden] -> [T, hidden], but for what is before the activation.

    With `reduce` off, each rank gives its part of the sum over the group.
    """

    def __init__(
        self,
        model: DecoderSpec,
        columns: Span,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layouts: Layouts = NO_LAYOUTS,
        reduce: bool = True,
    ) -> None:
        self._backend, self._activation = backend, model.activation
        outputs = [
            Output(weight, columns, bias, layout=layouts.get(role, PLAIN))
            for role, weight, bias in self._inputs(names)
        ]
        self._into = ColumnParallelLinear(model.hidden_size, outputs, dtype, device)
        self.down = RowParallelLinear(
            names.down,
            columns,
            model.hidden_size,
            group,
            dtype,
            device,
            names.down_bias,
            layout=layouts.get("down", PLAIN),
            reduce=reduce,
        )

    @staticmethod
    def _inputs(names: LayerNames) -> list[tuple[str, str, str | None]]:
        """(role, weight, bias) of the projections before the activation."""
        raise NotImplementedError

    @property
    def into(self) -> ColumnParallelLinear:
        """What is before the activation."""
        return self._into

    @property
    def takes_float8(self) -> bool:
        """Whether x may come rounded."""
        return self._into.takes_float8

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers, in the order of their use."""
        return [self._into, self.down]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill beside the linear layers."""
        return []


class GatedMLP(_FeedForward):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    @staticmethod
    def _inputs(names: LayerNames) -> list[tuple[str, str, str | None]]:
        return [("gate", names.gate, names.gate_bias), ("up", names.up, names.up_bias)]

    def __call__(self, x: Rows) -> Tensor:
        """x [T, hidden] -> [T, hidden], equal on every rank."""
        backend = self._backend
        if self.down.takes_float8 and isinstance(backend, Float8Backend):
            return self.down(backend.gated_quantize(self._into(x), self._activation))
        return self.down(backend.gated(self._into(x), self._activation))


class PlainMLP(_FeedForward):
    """down(act(up(x)))."""

    @staticmethod
    def _inputs(names: LayerNames) -> list[tuple[str, str, str | None]]:
        return [("up", names.up, names.up_bias)]

    def __call__(self, x: Rows) -> Tensor:
        """x [T, hidden] -> [T, hidden], equal on every rank."""
        return self.down(self._backend.activate(self._into(x), self._activation))


class NoMLP:
    """Of a layer that has none."""

    def __init__(self) -> None:
        self.linears: list[ColumnParallelLinear | RowParallelLinear] = []
        self.pieces: list[Piece] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Nothing is added."""
        return torch.zeros_like(x)
