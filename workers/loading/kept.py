"""Weights of a checkpoint that were packed at an earlier start, and are read from a file since."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.kernels.stored import Contents, StoringBackend, WeightStorage
from phalanx.protos.specs import DecoderSpec, WorkerSpec
from phalanx.workers.checkpoint.source import (
    GgufCheckpoint,
    SafetensorsCheckpoint,
    open_checkpoint,
)
from phalanx.workers.models.registry import ModelNames

from .assign import Loadable
from .fingerprint import facts_of
from .keeper import Keeper, keeper_of
from .pieces import Packable, Piece
from .shelf import Damaged, ShelfFile
from .weights import CheckpointWeights, Progress, Weights

_log = logging.getLogger(__name__)
LEAST_BYTES = 64 << 20
"""Of packed weights that are worth a file: it saves a tenth of a second and more."""


class Table(Protocol):
    """A weight that is used as it is filled."""

    weight: Tensor

    @property
    def pieces(self) -> list[Piece]:
        """What fills it."""

    def filled(self) -> None:
        """The weight is there already: it has no pieces any more."""


@runtime_checkable
class PackedLoadable(Loadable, Protocol):
    """A model whose weights may come packed."""

    def packables(self, stage: int) -> Sequence[Packable]:
        """What is packed with a stage."""

    @property
    def tables(self) -> Sequence[Table]:
        """What the first stage has beside; a table that is packed, too, is empty from then on."""


class KeptWeights:
    """`Weights` of a checkpoint: from the keeper's file what is there and whole, from the
    checkpoint all else, which the keeper then writes behind the start."""

    def __init__(
        self,
        checkpoint: CheckpointWeights,
        keeper: Keeper,
        storage: WeightStorage,
        pays: Callable[[Sequence[Contents]], bool] = lambda contents: True,
    ) -> None:
        """pays: whether what was packed is worth a file."""
        self._pays = pays
        self._checkpoint, self.keeper, self._storage = checkpoint, keeper, storage

    def names(self, model: DecoderSpec) -> ModelNames:
        """As the checkpoint calls them."""
        return self._checkpoint.names(model)

    def fill(
        self,
        layers: Loadable,
        model: DecoderSpec,
        names: ModelNames,
        progress: Progress,
        *,
        partial: bool,
    ) -> list[str]:
        """See `Weights`; the bits are those that the checkpoint alone would give."""
        if not isinstance(layers, PackedLoadable):
            return self._checkpoint.fill(layers, model, names, progress, partial=partial)
        started = time.perf_counter()
        try:
            file = self.keeper.open()
        except Damaged as error:
            file = None
            self.keeper.refuse(str(error))
        kept = _KeptLayers(layers, self._storage, file)
        try:
            unused = self._checkpoint.fill(kept, model, names, progress, partial=partial)
        finally:
            if file is not None:
                file.close()
        if file is not None and not kept.missed:
            seconds = time.perf_counter() - started
            _log.info("packed weights are those of an earlier start, read in %.2f s", seconds)
            return unused
        if file is not None:
            self.keeper.refuse("weights in it are damaged or missing")
        if kept.complete and self._pays(list(kept.linears.values())):
            self.keeper.write(kept.linears, kept.tables, self._storage)
        return unused


def kept_weights(spec: WorkerSpec, rank: int, backend: KernelBackend) -> Weights | None:
    """A rank's weights, where they are to be kept and the backend's can be; None: the engine's own
    way will do."""
    if spec.weight_cache is None or not isinstance(backend, StoringBackend):
        return None
    try:
        facts = facts_of(spec.checkpoint)  # first: what is mapped then is this or newer
    except OSError:
        return None  # whoever opens it says what is wrong
    checkpoint = open_checkpoint(spec.checkpoint)
    weights, storage = CheckpointWeights(checkpoint), backend.storage
    keeper = keeper_of(spec, rank, storage, facts)
    if keeper is None:
        return weights
    if spec.weight_cache.folder:
        return KeptWeights(weights, keeper, storage)
    rounded = _is_rounded(checkpoint)
    return KeptWeights(weights, keeper, storage, partial(_pays, storage, rounded))


def _pays(storage: WeightStorage, rounded: bool, contents: Sequence[Contents]) -> bool:
    """Whether the next start gains something that is worth the room. rounded: the checkpoint is."""
    sizes = {True: 0, False: 0}
    for linear in contents:
        sizes[rounded or storage.is_costly(linear)] += sum(map(len, linear.arrays))
    return sum(sizes.values()) >= LEAST_BYTES and sizes[True] > sizes[False]


def _is_rounded(checkpoint: SafetensorsCheckpoint | GgufCheckpoint) -> bool:
    """Whether most of the numbers have to be computed from blocks."""
    if not isinstance(checkpoint, GgufCheckpoint):
        return False
    sizes = {True: 0, False: 0}
    for tensor in checkpoint.file.tensors.values():
        sizes[tensor.type.block > 1] += math.prod(tensor.shape)
    return sizes[True] > sizes[False]


class _KeptLayers:
    """A model that looks into a file before it asks for its pieces."""

    def __init__(
        self, layers: PackedLoadable, storage: WeightStorage, file: ShelfFile | None
    ) -> None:
        self._layers, self._storage, self._file = layers, storage, file
        self._names: list[str] = []
        self.missed = False
        """Whether something was not in the file, or was not whole."""
        self.complete = True
        """Whether the backend has packed all by itself, so that it can be kept."""
        self.linears: dict[str, Contents] = {}
        self.tables: dict[str, Tensor] = {}

    @property
    def stages(self) -> list[list[Piece]]:
        """All pieces, wherever they will come from."""
        return self._layers.stages

    def open(self, stage: int) -> list[Piece]:
        """The pieces that the file does not make up for."""
        packables = self._layers.packables(stage)
        self._names = [_name(item.pieces) for item in packables]
        if stage == 0:
            self._names += [_name(table.pieces) for table in self._layers.tables]
        if self._file is not None:
            found = self._restore(self._file, packables)
            if stage == 0:
                found &= self._read_tables(self._file, self._names[len(packables) :])
            self.missed |= not found
        return self._layers.open(stage)

    def pack(self, stage: int) -> None:
        """Pack what was filled, and note what there is now."""
        self._layers.pack(stage)
        packables = self._layers.packables(stage)
        for name, item in zip(self._names, packables, strict=False):
            contents = self._storage.contents(item.packed)
            if contents is None:
                self.complete = False
            else:
                self.linears[name] = contents
        if stage == 0:
            names = self._names[len(packables) :]
            for name, table in zip(names, self._layers.tables, strict=True):
                if table.weight.numel():
                    self.tables[name] = table.weight

    def _restore(self, file: ShelfFile, packables: Sequence[Packable]) -> bool:
        """All weights of a stage or none."""
        known = file.index.linears
        if not all(name in known for name in self._names[: len(packables)]):
            return False
        stored = [known[name] for name, _ in zip(self._names, packables, strict=False)]
        restored = self._storage.restore(file.descriptor, stored)
        if restored is None:
            return False
        for item, packed in zip(packables, restored, strict=True):
            item.adopt(packed)
        return True

    def _read_tables(self, file: ShelfFile, names: list[str]) -> bool:
        whole = True
        for name, table in zip(names, self._layers.tables, strict=True):
            if len(table.pieces) != 1:  # packed
                continue
            array = file.index.tables.get(name)
            if array and self._storage.read(file.descriptor, array, table.weight):
                table.filled()
            else:
                whole = False
        return whole


def _name(pieces: Sequence[Piece]) -> str:
    """Says what a weight is made from: the slices of the checkpoint, and to which shape and type."""
    facts = [
        (
            piece.source,
            tuple(piece.target.shape),
            str(piece.target.dtype),
            piece.rows,
            piece.columns,
            piece.head_dim,
            piece.rotary_dim,
            piece.layout,
        )
        for piece in pieces
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
