"""Linear layers that know their own cut (Megatron-LM, Shoeybi 2019).

Column-parallel: the output features are divided, every rank reads the whole input.
Row-parallel: the input features are divided, the partial results are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from phalanx.kernels.float8 import Float8Linear, Float8Rows
from phalanx.kernels.interface import PackedLinear
from phalanx.protos.shards import Span
from phalanx.workers.loading.memory import room
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import PLAIN, Layout
from phalanx.workers.packing import LinearPacker
from phalanx.workers.parallel import TensorParallel

Rows = Tensor | Float8Rows
"""Inputs [T, in], as they are or already rounded."""


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
        self._outputs, self.exact = list(outputs), exact
        self.sizes = [output.rows.size for output in self._outputs]
        self._shape, self._dtype = (sum(self.sizes), in_features), dtype
        self._run: PackedLinear | None = None
        self.allocate(device)

    def allocate(self, device: torch.device) -> None:
        """Lay out what is to be filled, anew; on "meta" it takes no memory yet."""
        self.weight: Tensor | None = room(self._shape, self._dtype, device)
        has_bias = any(output.bias for output in self._outputs)
        self.bias = None
        if has_bias:
            self.bias = torch.zeros(self._shape[0], dtype=self._dtype, device=device)
        self.pieces: list[Piece] = []
        start = 0
        for output in self._outputs:
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

    def pack(self, backend: LinearPacker) -> None:
        """Hand the filled weight to the backend and drop our own reference."""
        if self.weight is not None:
            self._run = backend.pack_linear(self.weight, self.bias)
            self.weight, self.pieces = None, []

    def adopt(self, packed: PackedLinear) -> None:
        """Take what an equal layer was packed to, in place of being filled and packed."""
        self._run, self.weight, self.pieces = packed, None, []

    @property
    def packed(self) -> PackedLinear:
        """The backend's product: x [T, in] -> [T, local out]."""
        if self._run is None:
            raise RuntimeError("used before pack()")
        return self._run

    @property
    def takes_float8(self) -> bool:
        """Whether x may come rounded."""
        return isinstance(self._run, Float8Linear)

    def __call__(self, x: Rows) -> Tensor:
        """x [T, in] -> [T, local out], the projections side by side."""
        return _product(self.packed, x)


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
        self._names, self._columns, self._layout = (weight, bias), columns, layout
        self._shape, self._dtype = (out_features, columns.size), dtype
        self._run: PackedLinear | None = None
        self.allocate(device)

    def allocate(self, device: torch.device) -> None:
        """Lay out what is to be filled, anew; on "meta" it takes no memory yet."""
        (weight, bias), layout = self._names, self._layout
        self.weight: Tensor | None = room(self._shape, self._dtype, device)
        self.pieces = [Piece(weight, self.weight, columns=self._columns, layout=layout)]
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(self._shape[0], dtype=self._dtype, device=device)
            self.pieces.append(Piece(bias, self.bias, layout=Layout(entry=layout.entry)))

    def pack(self, backend: LinearPacker) -> None:
        """Hand the filled weight to the backend; only rank 0 keeps the bias."""
        if self.weight is not None:
            bias = self.bias if self._group.rank == 0 else None
            self._run = backend.pack_linear(self.weight, bias)
            self.weight, self.pieces = None, []

    def adopt(self, packed: PackedLinear) -> None:
        """Take what an equal layer was packed to, in place of being filled and packed."""
        self._run, self.weight, self.pieces = packed, None, []

    @property
    def packed(self) -> PackedLinear:
        """The backend's product: x [T, local in] -> this rank's part of [T, out]."""
        if self._run is None:
            raise RuntimeError("used before pack()")
        return self._run

    @property
    def takes_float8(self) -> bool:
        """Whether x may come rounded."""
        return isinstance(self._run, Float8Linear)

    def __call__(self, x: Rows) -> Tensor:
        """x [T, local in] -> [T, out], equal on every rank once reduced."""
        partial = _product(self.packed, x)
        return self._group.all_reduce(partial) if self._reduce else partial


def _product(packed: PackedLinear, x: Rows) -> Tensor:
    if isinstance(x, Tensor):
        return packed(x)
    if not isinstance(packed, Float8Linear):
        raise TypeError("rounded inputs of a weight that is not float8")
    return packed.of_rows(x)
