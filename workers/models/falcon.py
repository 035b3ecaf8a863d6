"""Falcon: 7B (one key/value head), 40B and 11B (new decoder), RW (ALiBi, sequential blocks)."""

from __future__ import annotations

import struct
from typing import Any

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .layout import grouped_heads
from .naming import Kind, ModelNames, model_names
from .positions import alibi_slopes


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Falcon config."""
    config = config.renamed(intermediate_size="ffn_hidden_size", num_key_value_heads="num_kv_heads")
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    new, parallel = config.flag("new_decoder_architecture"), config.flag("parallel_attn", True)
    if new and not parallel:
        raise config.wrong("parallel_attn", False, "true with new_decoder_architecture")
    two = new and config.integer("num_ln_in_parallel_attn", 2, most=2) == 2
    one_kv = not new and config.flag("multi_query", True)
    bias = config.flag("bias")
    positions: dict[str, Any] = {}
    if config.flag("alibi"):
        positions = {"rope": None, "alibi_slopes": _slopes(heads, hidden // heads)}
    return standard.decoder(
        config,
        "falcon",
        tied=True,
        max_context=config.integer("max_position_embeddings", 2048),
        num_kv_heads=1 if one_kv else None if new else heads,
        intermediate_size=config.integer("intermediate_size", 4 * hidden),
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        block="parallel_two" if two else "parallel" if parallel else "pre",
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        activation=standard.activation(config, "activation", "gelu"),
        **positions,
    )


def _slopes(heads: int, head_dim: int) -> tuple[float, ...]:
    """Falcon keeps the slopes in bfloat16 and scales them as it does the scores."""

    def rounded(value: float) -> float:
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])

    return tuple(rounded(slope) * head_dim**-0.5 for slope in alibi_slopes(heads))


_LAYER = "transformer.h.{layer}."
_FUSED = _LAYER + "self_attention.query_key_value"
_STEMS = {
    "input_norm": _LAYER + "input_layernorm",
    "query": _FUSED,
    "key": _FUSED,
    "value": _FUSED,
    "output": _LAYER + "self_attention.dense",
    "post_norm": _LAYER + "post_attention_layernorm",
    "up": _LAYER + "mlp.dense_h_to_4h",
    "down": _LAYER + "mlp.dense_4h_to_h",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    two = {"input_norm": _LAYER + "ln_attn", "post_norm": _LAYER + "ln_mlp"}
    return model_names(
        spec,
        _STEMS | two if spec.block == "parallel_two" else _STEMS,
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        head="lm_head",
        layouts=grouped_heads(spec.num_heads // spec.num_kv_heads, spec.head_dim),
        prefix="transformer.",
    )
