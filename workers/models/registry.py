"""Architectures by name: config -> `DecoderSpec`, and how a checkpoint names its tensors."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Protocol, cast

from phalanx.protos.errors import ModelError
from phalanx.protos.specs import DecoderSpec

from .config import ConfigReader, nearest
from .families import ARCHITECTURES, FAMILIES
from .naming import Kind, LayerNames, ModelNames
from .shapes import shapes

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Kind",
    "LayerNames",
    "ModelNames",
    "describe",
    "tensor_names",
    "tensor_shapes",
]


class Family(Protocol):
    """What a family's module offers."""

    def describe(self, config: ConfigReader, architecture: str) -> DecoderSpec:
        """Hugging Face config -> spec. Raises `ModelError` for what is not supported."""

    def names(self, spec: DecoderSpec, kind: Kind) -> ModelNames:
        """How checkpoints of `kind` name the tensors of `spec`."""


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ModelError(
            f"model family {name!r} is not supported; nearest: {nearest(name, FAMILIES)}"
        )
    return cast(Family, importlib.import_module(f"phalanx.workers.models.{FAMILIES[name].module}"))


def describe(config: Mapping[str, object]) -> DecoderSpec:
    """The spec of the model that a Hugging Face config describes.

    Raises `ModelError` for an unknown architecture, naming the nearest supported ones, and for any
    value that is wrong or not supported.
    """
    reader = ConfigReader(config)
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise reader.wrong("architectures", named, "a list with one name")
    architecture = named[0]
    if architecture not in ARCHITECTURES:
        raise reader.wrong("architectures", architecture, nearest(architecture, ARCHITECTURES))
    return _family(ARCHITECTURES[architecture]).describe(reader, architecture)


def tensor_names(
    spec: DecoderSpec, kind: Kind, present: Collection[str] | None = None
) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`.

    With `present`, the names of a checkpoint's tensors, as that very checkpoint does.
    """
    names = _family(spec.family).names(spec, kind)
    return names if present is None else names.found_in(present)


def tensor_shapes(
    spec: DecoderSpec, kind: Kind, present: Collection[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `kind` must hold, with its row-major shape."""
    return shapes(spec, tensor_names(spec, kind, present))
