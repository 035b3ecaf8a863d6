"""GPT-2 (transposed projections) and GPT-BigCode (one key/value head): learned positions."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .layout import Layout, grouped_heads, side_by_side
from .naming import Kind, ModelNames, model_names

_FIELDS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a GPT-2 or GPT-BigCode config."""
    config = config.renamed(**_FIELDS)
    config.require(scale_attn_by_inverse_layer_idx=False)
    plain = architecture == "GPT2LMHeadModel"
    one = not plain and config.flag("multi_query", True)
    heads = config.integer("num_attention_heads")
    return standard.decoder(
        config,
        "gpt2" if plain else "gpt_bigcode",
        tied=True,
        rope=None,
        num_kv_heads=1 if one else heads,
        intermediate_size=config.integer("intermediate_size", 4 * config.integer("hidden_size")),
        learned_positions=True,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation=standard.activation(
            config, default="gelu_new" if plain else "gelu_pytorch_tanh"
        ),
        attention_scale=None if config.flag("scale_attn_weights", True) else 1.0,
    )


_LAYER = "transformer.h.{layer}."
_STEMS = {
    "input_norm": _LAYER + "ln_1",
    "query": _LAYER + "attn.c_attn",
    "key": _LAYER + "attn.c_attn",
    "value": _LAYER + "attn.c_attn",
    "output": _LAYER + "attn.c_proj",
    "post_norm": _LAYER + "ln_2",
    "up": _LAYER + "mlp.c_fc",
    "down": _LAYER + "mlp.c_proj",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    plain = spec.family == "gpt2"
    layouts = side_by_side({"query": query, "key": kv, "value": kv}, transposed=plain)
    if plain:
        layouts |= {role: Layout(transposed=True) for role in ("output", "up", "down")}
    elif spec.num_kv_heads > 1:
        layouts = grouped_heads(1, spec.head_dim)
    masks = [_LAYER.format(layer=index) for index in range(spec.num_layers)]
    return model_names(
        spec,
        _STEMS,
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
        layouts=layouts,
        ignored=tuple(f"{mask}attn.{name}" for mask in masks for name in ("bias", "masked_bias")),
        prefix="transformer.",
    )
