"""The feed-forward block, gated or plain, its columns divided among the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import Span
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import NO_LAYOUTS, PLAIN, Layouts
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .linear import ColumnParallelLinear, Output, RowParallelLinear


class GatedMLP:
    """down(act(gate(x)) * up(x)) (Shazeer 2020): x [T, hidden] -> [T, hidden].

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
        self.gate_up = ColumnParallelLinear(
            model.hidden_size,
            [
                Output(names.gate, columns, names.gate_bias, layout=layouts.get("gate", PLAIN)),
                Output(names.up, columns, names.up_bias, layout=layouts.get("up", PLAIN)),
            ],
            dtype,
            device,
        )
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

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers, in the order of their use."""
        return [self.gate_up, self.down]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill beside the linear layers."""
        return []

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden], equal on every rank."""
        return self.down(self._backend.gated(self.gate_up(x), self._activation))


class PlainMLP:
    """down(act(up(x))): x [T, hidden] -> [T, hidden]; otherwise as `GatedMLP`."""

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
        outputs = [Output(names.up, columns, names.up_bias, layout=layouts.get("up", PLAIN))]
        self.up = ColumnParallelLinear(model.hidden_size, outputs, dtype, device)
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

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers, in the order of their use."""
        return [self.up, self.down]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill beside the linear layers."""
        return []

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden], equal on every rank."""
        return self.down(self._backend.activate(self.up(x), self._activation))
