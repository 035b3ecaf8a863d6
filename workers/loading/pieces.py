"""The cut of a weight, as data: which rectangle of which checkpoint tensor fills which memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from phalanx.kernels.interface import PackedLinear
from phalanx.protos.shards import Span
from phalanx.workers.models.layout import PLAIN, Layout


@dataclass(frozen=True, slots=True)
class Piece:
    """`target` is filled with tensor `source`, cut to `rows` and `columns` (None = all).

    `target` is a view into a layer's parameter and has the shape of the cut. Rows and columns
    count in the projection; `layout` says where they lie in the tensor. With `head_dim` set, the
    rows are the heads of a query or key projection, whose `rotary_dim` leading rows (None = all)
    some checkpoint kinds store permuted within each head.
    """

    source: str
    target: Tensor
    rows: Span | None = None
    columns: Span | None = None
    head_dim: int | None = None
    rotary_dim: int | None = None
    layout: Layout = PLAIN


class Packable(Protocol):
    """A weight that is filled and then packed, or takes what an equal one was packed to."""

    @property
    def pieces(self) -> list[Piece]:
        """What fills it; nothing any more once it is packed."""

    @property
    def packed(self) -> PackedLinear:
        """What it was packed to."""

    def adopt(self, packed: PackedLinear) -> None:
        """Take what an equal one was packed to; it need not be filled then."""
