"""Mixtral: Mistral with a mixture of experts in place of the feed-forward block."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec, ExpertSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames
from .positions import windows

_MOE = standard.LAYER + "block_sparse_moe."
_STEMS = standard.STEMS | {
    "router": _MOE + "gate",
    "expert_gate": _MOE + "experts.{expert}.w1",
    "expert_up": _MOE + "experts.{expert}.w3",
    "expert_down": _MOE + "experts.{expert}.w2",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Mixtral config."""
    config.require(attention_bias=False)
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    config = config.renamed(num_local_experts="num_experts")
    count = config.integer("num_local_experts", 8)
    return standard.decoder(
        config,
        "mixtral",
        theta=1e6,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        windows=windows(config, layers),
        experts=ExpertSpec(
            num_experts=count,
            per_token=config.integer("num_experts_per_tok", 2, most=count),
            intermediate_size=config.integer("intermediate_size"),
            renormalize=True,
            layers=tuple(range(layers)),
        ),
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    return standard.names(spec, kind, _STEMS)
