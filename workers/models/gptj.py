"""GPT-J and CodeGen: parallel block with one norm, neighbouring pairs rotated, a bias on the head.

CodeGen keeps queries, values and keys in one tensor, in four parts as it was trained on four chips.
"""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec, RopeSpec

from . import standard
from .config import ConfigReader
from .layout import NO_LAYOUTS, Layout
from .naming import Kind, ModelNames, model_names

_PARTS = 4
_FIELDS = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a GPT-J or CodeGen config."""
    config = config.renamed(**_FIELDS)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    codegen = architecture == "CodeGenForCausalLM"
    if codegen and heads % _PARTS:
        raise config.wrong("num_attention_heads", heads, f"multiples of {_PARTS}")
    rotary_dim = config.integer("rotary_dim", hidden // heads, most=hidden // heads)
    if rotary_dim % 2:
        raise config.wrong("rotary_dim", rotary_dim, "even numbers")
    return standard.decoder(
        config,
        "codegen" if codegen else "gptj",
        num_kv_heads=heads,
        rope=RopeSpec(rotary_dim=rotary_dim),
        intermediate_size=config.integer("intermediate_size", 4 * hidden),
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        block="parallel",
        gated_mlp=False,
        mlp_bias=True,
        head_bias=True,
        activation=standard.activation(config, default="gelu_new"),
    )


_MASKS = ("bias", "masked_bias", "causal_mask")
_LAYER = "transformer.h.{layer}."
_STEMS = {
    "input_norm": _LAYER + "ln_1",
    "query": _LAYER + "attn.q_proj",
    "key": _LAYER + "attn.k_proj",
    "value": _LAYER + "attn.v_proj",
    "output": _LAYER + "attn.out_proj",
    "up": _LAYER + "mlp.fc_in",
    "down": _LAYER + "mlp.fc_out",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    layers = [f"transformer.h.{index}.attn." for index in range(spec.num_layers)]
    stems, layouts = _STEMS, NO_LAYOUTS
    if spec.family == "codegen":
        run = spec.hidden_size // _PARTS
        order = ("query", "value", "key")
        stems = _STEMS | dict.fromkeys(order, _LAYER + "attn.qkv_proj")
        layouts = {
            role: Layout(offset=place * run, run=run, stride=3 * run)
            for place, role in enumerate(order)
        }
    return model_names(
        spec,
        stems,
        layouts=layouts,
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        permuted_heads=True,
        ignored=tuple(layer + name for layer in layers for name in _MASKS),
    )
