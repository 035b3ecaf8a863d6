"""GPT-NeoX and Pythia: parallel block with two norms, a quarter of each head rotated."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .layout import grouped_heads
from .naming import Kind, ModelNames, model_names


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a GPT-NeoX config."""
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    bias = config.flag("attention_bias", True)
    return standard.decoder(
        config.renamed(**names),
        "gpt_neox",
        partial=0.25,
        num_kv_heads=config.integer("num_attention_heads"),
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        block="parallel_two" if config.flag("use_parallel_residual", True) else "pre",
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        activation=standard.activation(config, default="gelu"),
    )


_LAYER = "gpt_neox.layers.{layer}."
_FUSED = _LAYER + "attention.query_key_value"
_STEMS = {
    "input_norm": _LAYER + "input_layernorm",
    "query": _FUSED,
    "key": _FUSED,
    "value": _FUSED,
    "output": _LAYER + "attention.dense",
    "post_norm": _LAYER + "post_attention_layernorm",
    "up": _LAYER + "mlp.dense_h_to_4h",
    "down": _LAYER + "mlp.dense_4h_to_h",
}
_BUFFERS = ("bias", "masked_bias", "rotary_emb.")


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    layers = [f"gpt_neox.layers.{index}.attention." for index in range(spec.num_layers)]
    return model_names(
        spec,
        _STEMS,
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        layouts=grouped_heads(1, spec.head_dim),
        ignored=tuple(layer + buffer for layer in layers for buffer in _BUFFERS),
        prefix="",
    )
