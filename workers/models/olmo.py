"""OLMo 1 (norms without weights), OLMo 2 and 3 (norms on what the blocks give), OLMoE.

All but OLMo 1 norm queries and keys over all heads together; OLMo 3 alternates sliding with full
attention; OLMoE is a mixture of experts in pre-norm blocks.
"""

from __future__ import annotations

from typing import Any

from phalanx.protos.specs import DecoderSpec, ExpertSpec

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
    if architecture == "OlmoeForCausalLM":
        config.require(clip_qkv=None)
        fields = {"block": "pre", "experts": _experts(config, layers)}
    if architecture == "Olmo3ForCausalLM":
        context, theta = config.integer("max_position_embeddings"), config.number("rope_theta", 5e5)
        head_dim = config.integer("hidden_size") // config.integer("num_attention_heads")
        fields = dict(ropes(config, head_dim, context, theta=theta, local_theta=theta))
        fields["windows"] = windows(config, layers, 4)
    return standard.decoder(
        config,
        "olmoe" if "experts" in fields else "olmo2",
        qk_norm="width",
        attention_bias=bias,
        output_bias=bias,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        **{"block": "post", **fields},
    )


def _experts(config: ConfigReader, layers: int) -> ExpertSpec:
    config = config.renamed(num_experts="num_local_experts")
    count = config.integer("num_experts", 64)
    return ExpertSpec(
        num_experts=count,
        per_token=config.integer("num_experts_per_tok", 8, most=count),
        intermediate_size=config.integer("intermediate_size"),
        renormalize=config.flag("norm_topk_prob"),
        layers=tuple(range(layers)),
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    if spec.family == "olmoe":
        return standard.names(spec, kind, standard.STEMS | standard.EXPERT_STEMS)
    return standard.names(spec, kind, _STEMS)
