"""EXAONE 4: norms on what the blocks give and on every head; full layers do not rotate."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames
from .positions import windows

_STEMS = standard.STEMS | {
    "attention_norm": standard.LAYER + "post_attention_layernorm",
    "mlp_norm": standard.LAYER + "post_feedforward_layernorm",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of an EXAONE 4 config; without a window all layers are full and rotate."""
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str):  # "LLLG": its length is the period
        period = len(pattern)
    else:
        period = config.integer("sliding_window_pattern", 4, least=0)
    sliding = windows(config, layers, period or None)
    return standard.decoder(
        config,
        "exaone4",
        block="post",
        qk_norm="head",
        norm_eps=config.number("rms_norm_eps", 1e-5),
        windows=sliding,
        unrotated=tuple(index for index, window in enumerate(sliding) if not window),
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    return standard.names(spec, kind, _STEMS)
