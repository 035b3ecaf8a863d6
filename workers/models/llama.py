"""Llama 1 to 3.3, SmolLM2 and every model of that shape, and its near relatives.

Pre-norm, grouped-query attention with rotary positions, gated SiLU feed-forward. Mistral has a
sliding window, Seed-OSS biased queries, SmolLM3 layers that do not rotate, Granite scales of its
own, Arcee an ungated feed-forward; Helium and ERNIE 4.5 rotate neighbouring elements.
"""

from __future__ import annotations

from typing import Any

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames
from .positions import windows


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of the config of any of these."""
    if architecture in ("MistralForCausalLM", "MinistralForCausalLM"):
        return _mistral(config, by_layer=architecture == "MinistralForCausalLM")
    if architecture in _NEIGHBOURS:
        return _interleaved(config, architecture)
    seed = architecture == "SeedOssForCausalLM"
    bias = config.flag("attention_bias", seed)
    fields: dict[str, Any] = {
        "attention_bias": bias,
        "output_bias": config.flag("attention_output_bias", bias),
        "mlp_bias": config.flag("mlp_bias"),
    }
    if seed:
        fields["output_bias"] = config.flag("attention_out_bias")
    elif architecture == "ArceeForCausalLM":
        fields |= {"gated_mlp": False, "activation": standard.activation(config, default="relu2")}
    elif architecture == "SmolLM3ForCausalLM":
        fields |= {"unrotated": _unrotated(config), "tied": True, "theta": 2e6}
    elif architecture == "GraniteForCausalLM":
        fields |= {
            "embedding_scale": config.number("embedding_multiplier", 1.0),
            "residual_scale": config.number("residual_multiplier", 1.0),
            "attention_scale": config.number("attention_multiplier", 1.0),
            "logit_scale": 1 / config.number("logits_scaling", 1.0),
        }
    return standard.decoder(config, "llama", **fields)


def _unrotated(config: ConfigReader) -> tuple[int, ...]:
    """Every fourth layer, or those where the list holds 0."""
    config.require(use_sliding_window=False)
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    period = config.integer("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers")
    if rotated is None:
        rotated = [int((index + 1) % period != 0) for index in range(layers)]
    if not isinstance(rotated, list) or len(rotated) != layers or not set(rotated) <= {0, 1}:
        raise config.wrong("no_rope_layers", rotated, f"{layers} times 0 or 1")
    return tuple(index for index, rotates in enumerate(rotated) if not rotates)


def _mistral(config: ConfigReader, by_layer: bool) -> DecoderSpec:
    config.require(attention_bias=False, mlp_bias=False)
    if not by_layer:
        config.require(layer_types=None)
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    # transformers' default where the field is absent; null is no window
    absent = "sliding_window" not in config
    return standard.decoder(
        config, "llama", windows=(4096,) * layers if absent else windows(config, layers)
    )


_NEIGHBOURS = {"HeliumForCausalLM": "helium", "Ernie4_5ForCausalLM": "ernie4_5"}


def _interleaved(config: ConfigReader, architecture: str) -> DecoderSpec:
    """Helium and ERNIE 4.5 rotate neighbouring elements."""
    helium = architecture == "HeliumForCausalLM"
    bias = config.flag("attention_bias" if helium else "use_bias")
    return standard.decoder(
        config,
        _NEIGHBOURS[architecture],
        tied=not helium,
        theta=100000.0 if helium else 500000.0,
        attention_bias=bias,
        output_bias=bias and not helium,
        mlp_bias=config.flag("mlp_bias") if helium else bias,
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    if kind == "gguf" and spec.family == "llama":
        return standard.gguf_names(spec, permuted_heads=True)
    return standard.names(spec, kind, permuted_heads=spec.family in _NEIGHBOURS.values())
