"""Gemma 1, 2 and 3 (text): scaled embeddings, norms stored as weight - 1, gated tanh GELU.

Gemma 2 and 3 norm what each block gives and alternate sliding with full attention; Gemma 2 caps
scores and logits, Gemma 3 norms the heads and rotates its sliding layers more slowly.
"""

from __future__ import annotations

from typing import Any

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .layout import Layout
from .naming import Kind, ModelNames
from .positions import ropes, windows

_NORMS = ("input_norm", "query_norm", "key_norm", "attention_norm", "post_norm", "mlp_norm")


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Gemma config."""
    config.require(use_bidirectional_attention=False)
    bias = config.flag("attention_bias")
    fields: dict[str, Any] = {
        "tied": True,
        "norm_offset": 1.0,
        "embedding_scale": config.integer("hidden_size") ** 0.5,
        "attention_bias": bias,
        "output_bias": bias,
        "activation": standard.activation(
            config.renamed(hidden_act="hidden_activation"), default="gelu_pytorch_tanh"
        ),
    }
    if architecture == "GemmaForCausalLM":
        return standard.decoder(config, "gemma", **fields)
    third = architecture == "Gemma3ForCausalLM"
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    period = config.renamed(sliding_window_pattern="_sliding_window_pattern").integer(
        "sliding_window_pattern", 6 if third else 2
    )
    fields |= {
        "block": "sandwich",
        "windows": windows(config, layers, period),
        "attention_scale": config.integer("query_pre_attn_scalar", 256) ** -0.5,
        "final_softcap": config.number("final_logit_softcapping", 0.0),
    }
    if not third:
        cap = config.number("attn_logit_softcapping", 0.0)
        return standard.decoder(config, "gemma2", attention_softcap=cap, **fields)
    config.require(attn_logit_softcapping=None)
    context, head_dim = config.integer("max_position_embeddings"), config.integer("head_dim", 256)
    local = config.number("rope_local_base_freq", 10000.0)
    both = ropes(config, head_dim, context, theta=1e6, local_theta=local)
    return standard.decoder(config, "gemma3", qk_norm="head", **both, **fields)


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    if kind == "gguf":  # llama.cpp stores the whole norm weight
        stems = standard.GGUF_STEMS | {
            "attention_norm": "blk.{layer}.post_attention_norm",
            "mlp_norm": "blk.{layer}.post_ffw_norm",
        }
        whole = {role: Layout(shift=-spec.norm_offset) for role in (*_NORMS, "final_norm")}
        return standard.gguf_names(spec, stems, layouts=whole)
    if spec.block == "pre":
        return standard.names(spec, kind)
    stems = standard.STEMS | {
        "attention_norm": standard.LAYER + "post_attention_layernorm",
        "post_norm": standard.LAYER + "pre_feedforward_layernorm",
        "mlp_norm": standard.LAYER + "post_feedforward_layernorm",
    }
    return standard.names(spec, kind, stems)
