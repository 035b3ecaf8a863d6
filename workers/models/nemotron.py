"""Nemotron: layer norms stored as weight - 1, half of each head rotated, squared ReLU."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Nemotron or Minitron config."""
    bias = config.flag("attention_bias")
    return standard.decoder(
        config.renamed(partial_rotary_factor="rope_percent"),
        "nemotron",
        partial=0.5,
        norm="layer",
        norm_bias=True,
        norm_offset=1.0,
        norm_eps=config.number("norm_eps", 1e-5),
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        activation=standard.activation(config, default="relu2"),
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    return standard.names(spec, kind)
