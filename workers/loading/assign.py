"""Streaming a rank's slices of a checkpoint into its layers, ending with an account."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from phalanx.protos.errors import ModelError
from phalanx.protos.shards import Span
from phalanx.workers.checkpoint.source import Checkpoint, TensorSlice
from phalanx.workers.models.llama import unpermute_heads

from .pieces import Piece

CHUNK_ELEMENTS = 4 * 1024 * 1024
"""A tensor is read in runs of rows of about this many elements, to keep the temporary small."""


class Loadable(Protocol):
    """A model that is filled stage by stage."""

    @property
    def stages(self) -> list[list[Piece]]:
        """Pieces of each stage."""

    def pack(self, stage: int) -> None:
        """Called when a stage is filled."""


def fill(
    model: Loadable,
    checkpoint: Checkpoint,
    *,
    permuted_heads: bool,
    ignored: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Fill every piece of `model`; return the checkpoint tensors that were left unused by name.

    `progress` is called with elements done and in all. Raises `ModelError` for a tensor that is
    missing or misshapen, and for one in the checkpoint that is neither used nor in `ignored`
    (a prefix of the names that may be left out).
    """
    stages = model.stages
    names = set(checkpoint.names())
    wanted = {piece.source for stage in stages for piece in stage}
    if missing := sorted(wanted - names):
        raise ModelError(f"checkpoint lacks {len(missing)} tensors, the first is {missing[0]!r}")
    unused = sorted(names - wanted)
    unknown = [name for name in unused if not name.startswith(tuple(ignored))]
    if unknown:
        raise ModelError(
            f"checkpoint holds {len(unknown)} tensors that the model has no place for, "
            f"the first is {unknown[0]!r}"
        )
    total = sum(piece.target.numel() for stage in stages for piece in stage)
    done = 0
    for index, stage in enumerate(stages):
        for piece in stage:
            for amount in _fill_piece(piece, checkpoint, permuted_heads):
                done += amount
                progress(done, total)
        model.pack(index)
    return unused


def _fill_piece(piece: Piece, checkpoint: Checkpoint, permuted_heads: bool) -> Iterable[int]:
    shape = checkpoint.shape(piece.source)
    _check_shape(piece, shape)
    rows = piece.rows or Span(0, shape[0])
    columns = None if piece.columns is None else slice(*piece.columns)
    unit = (piece.head_dim or 1) if permuted_heads else 1
    step = max(CHUNK_ELEMENTS // max(shape[-1], 1) // unit, 1) * unit
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        part = checkpoint.read(piece.source, slice(start, stop), columns)
        if permuted_heads and piece.head_dim:
            part = TensorSlice(unpermute_heads(part.array, piece.head_dim), part.dtype)
        target = piece.target[start - rows.start : stop - rows.start]
        target.copy_(to_tensor(part))
        yield target.numel()


def _check_shape(piece: Piece, shape: tuple[int, ...]) -> None:
    cuts = [piece.rows, piece.columns][: len(shape)]
    fits = len(shape) == piece.target.dim() and all(
        size == local if cut is None else cut.stop <= size and cut.size == local
        for size, local, cut in zip(shape, piece.target.shape, cuts, strict=True)
    )
    if not fits:
        raise ModelError(
            f"tensor {piece.source!r} has shape {shape}; the model cuts rows {piece.rows}, "
            f"columns {piece.columns} into {tuple(piece.target.shape)}"
        )


def to_tensor(part: TensorSlice) -> Tensor:
    """The slice as a torch tensor; bfloat16 arrives as its bits in uint16."""
    array = np.ascontiguousarray(part.array)
    if not array.flags.writeable:
        array = array.copy()  # torch warns of read-only memory
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if part.dtype == "bfloat16" else tensor
