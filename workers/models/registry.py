"""Architectures by name: config -> `DecoderSpec`, and how a checkpoint names its tensors."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Protocol, cast

from phalanx.protos.errors import ModelError
from phalanx.protos.specs import DecoderSpec

from .config import ConfigReader, nearest

Kind = Literal["safetensors", "gguf"]

FAMILIES = {"llama": "phalanx.workers.models.llama"}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"}


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Checkpoint names of one layer's tensors; a bias that the model lacks is None."""

    input_norm: str
    query: str
    key: str
    value: str
    output: str
    post_norm: str
    gate: str
    up: str
    down: str
    query_bias: str | None = None
    key_bias: str | None = None
    value_bias: str | None = None
    output_bias: str | None = None
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """Checkpoint names of a model's tensors.

    `layers` holds templates with `{layer}`. `permuted_heads`: query and key rows are stored for
    interleaved rotation, see `llama.unpermute_heads`. `ignored`: prefixes of tensors that a
    checkpoint may hold and the model does not need. A tied model's `head` is its embedding.
    """

    embedding: str
    final_norm: str
    head: str
    layers: LayerNames
    permuted_heads: bool = False
    ignored: tuple[str, ...] = ()

    def layer(self, index: int) -> LayerNames:
        """Names of layer `index`."""
        templates = {item.name: getattr(self.layers, item.name) for item in fields(LayerNames)}
        return LayerNames(
            **{
                name: template and template.format(layer=index)
                for name, template in templates.items()
            }
        )


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
    return cast(Family, importlib.import_module(FAMILIES[name]))


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


def tensor_names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    return _family(spec.family).names(spec, kind)


def tensor_shapes(spec: DecoderSpec, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of `kind` must hold, with its row-major shape."""
    names = tensor_names(spec, kind)
    hidden, inner = spec.hidden_size, spec.intermediate_size
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        names.embedding: (spec.vocab_size, hidden),
        names.head: (spec.vocab_size, hidden),
        names.final_norm: (hidden,),
    }
    for index in range(spec.num_layers):
        layer = names.layer(index)
        matrices = [
            (layer.query, layer.query_bias, (query, hidden)),
            (layer.key, layer.key_bias, (kv, hidden)),
            (layer.value, layer.value_bias, (kv, hidden)),
            (layer.output, layer.output_bias, (hidden, query)),
            (layer.gate, layer.gate_bias, (inner, hidden)),
            (layer.up, layer.up_bias, (inner, hidden)),
            (layer.down, layer.down_bias, (hidden, inner)),
        ]
        for weight, bias, shape in matrices:
            shapes[weight] = shape
            if bias is not None:
                shapes[bias] = shape[:1]
        shapes[layer.input_norm] = shapes[layer.post_norm] = (hidden,)
    return shapes
