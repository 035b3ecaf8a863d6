"""MPT: ALiBi with slopes of its own order, fused projections, no biases at all.

The steepest slope follows `alibi_bias_max`, as in training; transformers takes 8 whatever it says.
"""

from __future__ import annotations

import math

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames, model_names

_FIELDS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "max_position_embeddings": "max_seq_len",
}
_SUPPORTED = {
    "attn_type": "multihead_attention",
    "qk_ln": False,
    "prefix_lm": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "rope": False,
    "sliding_window_size": -1,
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of an MPT config; variants that transformers does not run are refused."""
    config = config.renamed(**_FIELDS)
    config.require(no_bias=True, logit_scale=None, embedding_fraction=1.0)
    attention = config.section("attn_config") or ConfigReader({}, "attn_config")
    attention.require(**_SUPPORTED)
    ratio = config.integer("expansion_ratio", 4)
    if ratio != 4:
        raise config.wrong("expansion_ratio", ratio, "4")
    heads = config.integer("num_attention_heads")
    scale = attention.number("softmax_scale", 0.0)
    return standard.decoder(
        config,
        "mpt",
        tied=True,
        rope=None,
        intermediate_size=4 * config.integer("hidden_size"),
        alibi_slopes=_slopes(heads, attention.integer("alibi_bias_max", 8)),
        attention_scale=scale or None,
        qkv_clip=attention.number("clip_qkv", 0.0),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        gated_mlp=False,
        activation="gelu",
    )


def _slopes(heads: int, most: int) -> tuple[float, ...]:
    """Slopes of the next power of two; where that is more, those at odd places come first."""
    above = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-most * (index + 1) / above) for index in range(above)]
    return tuple(slopes if above == heads else (slopes[1::2] + slopes[::2])[:heads])


_LAYER = "transformer.blocks.{layer}."
_STEMS = {
    "input_norm": _LAYER + "norm_1",
    "query": _LAYER + "attn.Wqkv",
    "key": _LAYER + "attn.Wqkv",
    "value": _LAYER + "attn.Wqkv",
    "output": _LAYER + "attn.out_proj",
    "post_norm": _LAYER + "norm_2",
    "up": _LAYER + "ffn.up_proj",
    "down": _LAYER + "ffn.down_proj",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    return model_names(
        spec,
        _STEMS,
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
        head="lm_head",
        layouts=standard.fused_qkv(spec),
        prefix="transformer.",
    )
