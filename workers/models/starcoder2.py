"""StarCoder2: layer norms and biases, rotary positions, a sliding window, plain tanh GELU."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames
from .positions import windows

_STEMS = standard.STEMS | {
    "up": standard.LAYER + "mlp.c_fc",
    "down": standard.LAYER + "mlp.c_proj",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a StarCoder2 config."""
    config.require(norm_type="layer_norm", mlp_type="default")
    bias = config.flag("use_bias", True)
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    return standard.decoder(
        config,
        "starcoder2",
        tied=True,
        windows=windows(config, layers),
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("norm_epsilon", 1e-5),
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        activation=standard.activation(config, default="gelu_pytorch_tanh"),
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    return standard.names(spec, kind, _STEMS)
