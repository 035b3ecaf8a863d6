"""The cut of a weight, as data: which rectangle of which checkpoint tensor fills which memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from phalanx.protos.shards import Span


@dataclass(frozen=True, slots=True)
class Piece:
    """`target` is filled with tensor `source`, cut to `rows` and `columns` (None = all).

    `target` is a view into a layer's parameter and has the shape of the cut. With `head_dim`
    set, the rows are the heads of a query or key projection, which some checkpoint kinds store
    permuted within each head.
    """

    source: str
    target: Tensor
    rows: Span | None = None
    columns: Span | None = None
    head_dim: int | None = None
