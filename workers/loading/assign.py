"""Streaming a rank's slices of a checkpoint into its layers, ending with an account."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from phalanx.protos.errors import ModelError
from phalanx.protos.shards import Span
from phalanx.workers.checkpoint.slices import TensorSlice
from phalanx.workers.models.layout import unpermute_heads

from .pieces import Piece

CHUNK_ELEMENTS = 4 * 1024 * 1024
"""A tensor is read in runs of rows of about this many elements, to keep the temporary small."""


class Source(Protocol):
    """Named tensors that are read by slice: see `Checkpoint`."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape."""

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        entry: int | None = None,
    ) -> TensorSlice:
        """A rectangle of a matrix, or rows of a vector; with `entry`, of that one of a stack."""


class Loadable(Protocol):
    """A model that is filled stage by stage."""

    @property
    def stages(self) -> list[list[Piece]]:
        """Pieces of each stage."""

    def open(self, stage: int) -> list[Piece]:
        """The pieces of a stage, in memory."""

    def pack(self, stage: int) -> None:
        """Called when a stage is filled."""


def fill(
    model: Loadable,
    checkpoint: Source,
    *,
    permuted_heads: bool,
    ignored: Sequence[str] = (),
    elsewhere: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Fill every piece of `model`; return the checkpoint tensors that were left unused by name.

    `progress` is called with elements done and in all. Raises `ModelError` for a tensor that is
    missing or misshapen, and for one in the checkpoint that is neither used nor in `ignored`
    (a prefix of the names that may be left out). Tensors of other stages, `elsewhere`, are none of
    this rank's business.
    """
    stages = model.stages
    names = set(checkpoint.names())
    wanted = {piece.source for stage in stages for piece in stage}
    if missing := sorted(wanted - names):
        raise ModelError(f"checkpoint lacks {len(missing)} tensors, the first is {missing[0]!r}")
    unused = sorted(names - wanted - set(elsewhere))
    unknown = [name for name in unused if not name.startswith(tuple(ignored))]
    if unknown:
        raise ModelError(
            f"checkpoint holds {len(unknown)} tensors that the model has no place for, "
            f"the first is {unknown[0]!r}"
        )
    sizes = [sum(piece.target.numel() for piece in stage) for stage in stages]
    total, count = sum(sizes), len(stages)
    del stages
    for index in range(count):
        done = sum(sizes[:index])
        stage = model.open(index)
        while stage:  # nothing here holds a piece when its stage is packed, so its memory is freed
            for amount in _fill_piece(stage.pop(0), checkpoint, permuted_heads):
                done += amount
                progress(done, total)
        model.pack(index)
        progress(sum(sizes[: index + 1]), total)
    return unused


def _fill_piece(piece: Piece, checkpoint: Source, permuted_heads: bool) -> Iterable[int]:
    _check_shape(piece, checkpoint.shape(piece.source))
    rows = piece.rows or Span(0, piece.target.shape[0])
    permuted = permuted_heads and piece.head_dim is not None
    unit = (piece.head_dim or 1) if permuted and not piece.layout.heads_as_rows else 1
    width = piece.target.shape[1] if piece.target.dim() > 1 else 1
    step = max(CHUNK_ELEMENTS // max(width, 1) // unit, 1) * unit
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        part = _read(piece, checkpoint, start, stop)
        if permuted and piece.head_dim:
            array = part.array.reshape(-1) if piece.layout.heads_as_rows else part.array
            array = unpermute_heads(array, piece.head_dim, piece.rotary_dim)
            part = TensorSlice(array.reshape(part.array.shape), part.dtype)
        target = piece.target[start - rows.start : stop - rows.start]
        values = to_tensor(part)
        target.copy_(values + piece.layout.shift if piece.layout.shift else values)
        yield target.numel()


def _read(piece: Piece, checkpoint: Source, start: int, stop: int) -> TensorSlice:
    """Rows [start, stop) of the projection, from where its layout says that they lie."""
    columns = None if piece.columns is None else slice(*piece.columns)
    layout = piece.layout
    flipped = layout.transposed and piece.target.dim() > 1
    runs, step = layout.runs(start, stop), 1
    if layout.run == 1:  # single rows at equal distances: one read of all, and what is between
        runs, step = [(runs[0][0], runs[-1][1])], layout.stride
    parts = []
    for first, last in runs:
        rows = slice(first, last)
        down, across = (columns, rows) if flipped else (rows, columns)
        parts.append(checkpoint.read(piece.source, down, across, layout.entry))
    arrays = [(part.array.T if flipped else part.array)[::step] for part in parts]
    array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return TensorSlice(array, parts[0].dtype)


def _check_shape(piece: Piece, shape: tuple[int, ...]) -> None:
    """The tensor holds the rows and columns asked for, and no others where all are taken."""
    target, stored = piece.target.shape, shape
    if piece.layout.entry is not None:
        shape = shape[1:]
    sizes = shape[::-1] if piece.layout.transposed else shape
    cuts = [piece.rows or Span(0, target[0]), piece.columns or Span(0, target[-1])][: len(sizes)]
    fits = len(shape) == len(target) and [cut.size for cut in cuts] == list(target)
    if fits:
        runs = piece.layout.runs(*cuts[0])
        fits = not runs or runs[-1][1] <= sizes[0]
        fits &= len(sizes) < 2 or cuts[1].stop <= sizes[1]
        whole = piece.layout.run == 0 and piece.layout.offset == 0
        fits &= piece.rows is not None or not whole or target[0] == sizes[0]
        fits &= piece.columns is not None or len(sizes) < 2 or target[1] == sizes[1]
    if not fits:
        raise ModelError(
            f"tensor {piece.source!r} has shape {stored}; the model cuts rows {piece.rows}, "
            f"columns {piece.columns} into {tuple(target)}"
        )


def to_tensor(part: TensorSlice) -> Tensor:
    """The slice as a torch tensor; bfloat16 arrives as its bits in uint16."""
    array = np.ascontiguousarray(part.array)
    if not array.flags.writeable:
        array = array.copy()  # torch warns of read-only memory
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if part.dtype == "bfloat16" else tensor
