"""Linear layers that know their own cut (Megatron-LM, Shoeybi 2019).

Column-parallel: the output features are divided, every rank reads the whole input.
Row-parallel: the input features are divided, the partial results are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.interface import PackedLinear
from phalanx.protos.shards import Span
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import PLAIN, Layout
from phalanx.workers.packing import LinearPacker
from phalanx.workers.parallel import TensorParallel


class Output(NamedTuple):
    """One of the projections fused into a column-parallel layer."""

    weight: str
    """Checkpoint name."""
    rows: Span
    """Output features of this rank."""
    bias: str | None = None
    head_dim: int | None = None
    """Set where the rows are query or key heads."""
    rotary_dim: int | None = None
    """Rows of each head that are rotated, None = all."""
    layout: Layout = PLAIN


class ColumnParallelLinear:
    """Several projections of one input, fused: x [T, in] -> [T, sum of local rows].

    What is `exact` is not rounded below the model's activations: the router of experts.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Iterable[Output],
        dtype: torch.dtype,
        device: torch.device,
        *,
        exact: bool = False,
    ) -> None:
        outputs, self.exact = list(outputs), exact
        self.sizes = [output.rows.size for output in outputs]
        self.weight: Tensor | None = torch.empty(
            sum(self.sizes), in_features, dtype=dtype, device=device
        )
        has_bias = any(output.bias for output in outputs)
        self.bias = torch.zeros(sum(self.sizes), dtype=dtype, device=device) if has_bias else None
        self.pieces: list[Piece] = []
        start = 0
        for output in outputs:
            part = slice(start, start + output.rows.size)
            filled = [(output.weight, self.weight[part])]
            if output.bias and self.bias is not None:
                filled.append((output.bias, self.bias[part]))
            for name, target in filled:
                piece = Piece(
                    name,
                    target,
                    output.rows,
                    head_dim=output.head_dim,
                    rotary_dim=output.rotary_dim,
                    layout=output.layout,
                )
                self.pieces.append(piece)
            start += output.rows.size
        self._run: PackedLinear | None = None

    def pack(self, backend: LinearPacker) -> None:
        """Hand the filled weight to the backend and drop our own reference."""
        if self.weight is not None:
            self._run = backend.pack_linear(self.weight, self.bias)
            self.weight, self.pieces = None, []

    @property
    def packed(self) -> PackedLinear:
        """The backend's product: x [T, in] -> [T, local out]."""
        if self._run is None:
            raise RuntimeError("used before pack()")
        return self._run

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, local out], the projections side by side."""
        return self.packed(x)


class RowParallelLinear:
    """x [T, local in] -> [T, out], summed over the ranks; the bias is added once.

    With `reduce` off the sum is left to the caller.
    """

    exact = False

    def __init__(
        self,
        weight: str,
        columns: Span,
        out_features: int,
        group: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        bias: str | None = None,
        *,
        layout: Layout = PLAIN,
        reduce: bool = True,
    ) -> None:
        self._group, self._reduce = group, reduce
        self.weight: Tensor | None = torch.empty(
            out_features, columns.size, dtype=dtype, device=device
        )
        self.pieces = [Piece(weight, self.weight, columns=columns, layout=layout)]
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(out_features, dtype=dtype, device=device)
            self.pieces.append(Piece(bias, self.bias, layout=Layout(entry=layout.entry)))
        self._run: PackedLinear | None = None

    def pack(self, backend: LinearPacker) -> None:
        """Hand the filled weight to the backend; only rank 0 keeps the bias."""
        if self.weight is not None:
            bias = self.bias if self._group.rank == 0 else None
            self._run = backend.pack_linear(self.weight, bias)
            self.weight, self.pieces = None, []

    @property
    def packed(self) -> PackedLinear:
        """The backend's product: x [T, local in] -> this rank's part of [T, out]."""
        if self._run is None:
            raise RuntimeError("used before pack()")
        return self._run

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, local in] -> [T, out], equal on every rank once reduced."""
        partial = self.packed(x)
        return self._group.all_reduce(partial) if self._reduce else partial
