"""Where a rank's weights come from: a checkpoint, or random numbers for measuring and testing."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from phalanx.protos.specs import DecoderSpec
from phalanx.workers.checkpoint.slices import Array, TensorSlice
from phalanx.workers.checkpoint.source import Kind, open_checkpoint
from phalanx.workers.models.registry import ModelNames, tensor_names, tensor_shapes

from .assign import Loadable, Source, fill

Progress = Callable[[int, int], None]


class Weights(Protocol):
    """Fills a model whose tensors it names."""

    def names(self, model: DecoderSpec) -> ModelNames:
        """What the model's tensors are called."""

    def fill(
        self,
        layers: Loadable,
        model: DecoderSpec,
        names: ModelNames,
        progress: Progress,
        *,
        partial: bool,
    ) -> list[str]:
        """Fill and pack the layers; the tensors that were left over. partial: other ranks have
        further layers."""


class NamedSource(Source, Protocol):
    """A source that says how its tensors are named."""

    @property
    def kind(self) -> Kind:
        """How tensors are named and stored."""


class CheckpointWeights:
    """Those of a checkpoint, slice by slice."""

    def __init__(self, checkpoint: NamedSource) -> None:
        self._checkpoint = checkpoint

    @classmethod
    def at(cls, path: str) -> CheckpointWeights:
        """Those of a folder of safetensors or of a GGUF file."""
        return cls(open_checkpoint(path))

    def names(self, model: DecoderSpec) -> ModelNames:
        """As this very checkpoint calls them."""
        return tensor_names(model, self._checkpoint.kind, self._checkpoint.names())

    def fill(
        self,
        layers: Loadable,
        model: DecoderSpec,
        names: ModelNames,
        progress: Progress,
        *,
        partial: bool,
    ) -> list[str]:
        """Just the slices that the layers ask for."""
        elsewhere: set[str] = set()
        if partial:
            present = self._checkpoint.names()
            elsewhere = set(tensor_shapes(model, self._checkpoint.kind, present))
        return fill(
            layers,
            self._checkpoint,
            permuted_heads=names.permuted_heads,
            ignored=names.ignored,
            elsewhere=elsewhere,
            progress=progress,
        )


class DrawnCheckpoint:
    """Random tensors of a model, the same on every machine and at any number of ranks.

    Matrices are scaled to keep the size of what goes through them, vectors are near one. Tensors
    are drawn whole, whatever part is read: this is for small models.
    """

    kind: Kind = "safetensors"

    def __init__(self, model: DecoderSpec, seed: int = 0) -> None:
        self._shapes, self._seed = tensor_shapes(model, self.kind), seed
        self._last = ("", np.empty(0, dtype=np.float32))

    def names(self) -> list[str]:
        """All that the model needs."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape."""
        return self._shapes[name]

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        entry: int | None = None,
    ) -> TensorSlice:
        """A rectangle in float32."""
        if self._last[0] != name:
            self._last = (name, self._draw(name))
        whole = self._last[1] if entry is None else self._last[1][entry]
        array = whole[rows or slice(None)]
        return TensorSlice(array if columns is None else array[:, columns], "float32")

    def _draw(self, name: str) -> Array:
        shape = self._shapes[name]
        draw = np.random.Generator(np.random.Philox(key=[self._seed, zlib.crc32(name.encode())]))
        if len(shape) == 1:
            return draw.uniform(0.5, 1.5, shape).astype(np.float32)
        return draw.standard_normal(shape, dtype=np.float32) * np.float32(shape[1] ** -0.5)


class RandomWeights:
    """As `DrawnCheckpoint`, but drawn where the tensors are: fast, and another model on another
    kind of device and at another number of ranks."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def names(self, model: DecoderSpec) -> ModelNames:
        """As safetensors of the family call them."""
        return tensor_names(model, "safetensors")

    def fill(
        self,
        layers: Loadable,
        model: DecoderSpec,
        names: ModelNames,
        progress: Progress,
        *,
        partial: bool,
    ) -> list[str]:
        """Nothing is left over."""
        generators: dict[torch.device, torch.Generator] = {}
        for index in range(len(layers.stages)):
            stage = layers.open(index)
            while stage:
                target = stage.pop(0).target
                if target.device not in generators:
                    generator = torch.Generator(target.device).manual_seed(self._seed)
                    generators[target.device] = generator
                generator = generators[target.device]
                if target.dim() > 1:
                    target.normal_(0.0, max(target.shape[1], 1) ** -0.5, generator=generator)
                else:
                    target.uniform_(0.5, 1.5, generator=generator)
            layers.pack(index)
        return []
