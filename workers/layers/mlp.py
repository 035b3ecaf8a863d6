"""The gated feed-forward block, its columns divided among the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import Span
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .linear import ColumnParallelLinear, Output, RowParallelLinear


class GatedMLP:
    """down(silu(gate(x)) * up(x)) (Shazeer 2020): x [T, hidden] -> [T, hidden]."""

    def __init__(
        self,
        model: DecoderSpec,
        columns: Span,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._backend = backend
        self.gate_up = ColumnParallelLinear(
            model.hidden_size,
            [
                Output(names.gate, columns, names.gate_bias),
                Output(names.up, columns, names.up_bias),
            ],
            dtype,
            device,
        )
        self.down = RowParallelLinear(
            names.down, columns, model.hidden_size, group, dtype, device, names.down_bias
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden], equal on every rank."""
        return self.down(self._backend.silu_mul(self.gate_up(x)))
