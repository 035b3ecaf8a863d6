"""OLMo 1 (norms without weights), OLMo 2 and 3 (norms on what the blocks give).

OLMo 2 and 3 norm queries and keys over all heads together; OLMo 3 alternates sliding with full
attention.
"""

from __future__ import annotations

from typing import Any

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames
from .positions import ropes, windows

_STEMS = standard.STEMS | {
    "attention_norm": standard.LAYER + "post_attention_layernorm",
    "mlp_norm": standard.LAYER + "post_feedforward_layernorm",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of an OLMo config."""
    bias = config.flag("attention_bias")
    if architecture == "OlmoForCausalLM":
        return standard.decoder(
            config,
            "olmo",
            norm="layer",
            norm_affine=False,
            norm_eps=1e-5,
            attention_bias=bias,
            output_bias=bias,
            qkv_clip=config.number("clip_qkv", 0.0),
        )
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    fields: dict[str, Any] = {}
    if architecture == "Olmo3ForCausalLM":
        context, theta = config.integer("max_position_embeddings"), config.number("rope_theta", 5e5)
        head_dim = config.integer("hidden_size") // config.integer("num_attention_heads")
        fields = dict(ropes(config, head_dim, context, theta=theta, local_theta=theta))
        fields["windows"] = windows(config, layers, 4)
    return standard.decoder(
        config,
        "olmo2",
        block="post",
        qk_norm="width",
        attention_bias=bias,
        output_bias=bias,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        **fields,
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    return standard.names(spec, kind, _STEMS)
