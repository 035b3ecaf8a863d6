"""Cohere Command-R: parallel block, layer norm without bias, neighbouring pairs, scaled logits.

Command-R+ norms every head; Command-R7B and Command-A alternate sliding layers with full ones,
which do not rotate.
"""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .layout import Layout
from .naming import Kind, ModelNames
from .positions import windows


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Command-R config."""
    bias = config.flag("attention_bias")
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    second = architecture == "Cohere2ForCausalLM"
    period = config.renamed(sliding_window_pattern="_sliding_window_pattern").integer(
        "sliding_window_pattern", 4
    )
    sliding = windows(config, layers, period) if second else ()
    if second and not sliding:
        raise config.wrong("sliding_window", config.get("sliding_window"), "numbers above 0")
    return standard.decoder(
        config,
        "cohere",
        tied=True,
        theta=10000.0 if second else 500000.0,
        windows=sliding,
        unrotated=tuple(index for index, window in enumerate(sliding) if not window),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        block="parallel",
        qk_norm="each" if config.flag("use_qk_norm") else "none",
        attention_bias=bias,
        output_bias=bias,
        logit_scale=config.number("logit_scale", 0.0625),
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    norms = {"query_norm": Layout(heads_as_rows=True)}
    return standard.names(spec, kind, layouts=norms, permuted_heads=True)
