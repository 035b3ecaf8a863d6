"""Qwen2 and Qwen2.5 (biased projections), Qwen3 (normed heads), and their mixtures of experts."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec, ExpertSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames
from .positions import windows


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Qwen config."""
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    if architecture == "Qwen2MoeForCausalLM":
        config.require(use_sliding_window=False)  # its layers alternate in another way
    found = _windows(config, layers) if config.flag("use_sliding_window") else ()
    experts = _experts(config, layers) if "Moe" in architecture else None
    if architecture.startswith("Qwen2"):
        bias = config.flag("qkv_bias", True)
        return standard.decoder(
            config, "qwen2", attention_bias=bias, windows=found, experts=experts
        )
    bias = config.flag("attention_bias")
    return standard.decoder(
        config,
        "qwen3",
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        windows=found,
        experts=experts,
    )


def _windows(config: ConfigReader, layers: int) -> tuple[int, ...]:
    """The layers from `max_window_layers` on are sliding, unless `layer_types` says otherwise."""
    if config.get("layer_types") is not None:
        return windows(config, layers)
    first = config.integer("max_window_layers", 28, least=0)
    window = config.integer("sliding_window", 4096)
    found = tuple(window if index >= first else 0 for index in range(layers))
    return found if any(found) else ()


def _experts(config: ConfigReader, layers: int) -> ExpertSpec:
    config = config.renamed(num_experts="num_local_experts")
    count, step = config.integer("num_experts"), config.integer("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise config.wrong("mlp_only_layers", dense, "a list of layers")
    return ExpertSpec(
        num_experts=count,
        per_token=config.integer("num_experts_per_tok", most=count),
        intermediate_size=config.integer("moe_intermediate_size"),
        renormalize=config.flag("norm_topk_prob"),
        shared_size=config.integer("shared_expert_intermediate_size", 0, least=0),
        layers=tuple(
            index for index in range(layers) if index not in dense and (index + 1) % step == 0
        ),
    )


_STEMS = {
    **standard.STEMS,
    **standard.EXPERT_STEMS,
    "shared_router": standard.LAYER + "mlp.shared_expert_gate",
    "shared_gate": standard.LAYER + "mlp.shared_expert.gate_proj",
    "shared_up": standard.LAYER + "mlp.shared_expert.up_proj",
    "shared_down": standard.LAYER + "mlp.shared_expert.down_proj",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    if kind == "gguf" and spec.experts is None:
        return standard.gguf_names(spec)
    return standard.names(spec, kind, _STEMS)
