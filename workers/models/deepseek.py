"""DeepSeek-V2 and V3: latent attention, and experts chosen within groups."""

from __future__ import annotations

import dataclasses
import math

from msgspec.structs import replace

from phalanx.protos.specs import DecoderSpec, ExpertSpec, LatentSpec

from . import standard
from .config import ConfigReader
from .layout import Layout
from .naming import Kind, ModelNames

MAX_MAGNITUDE = 1e6
"""Of `mscale_all_dim`, so that its square stays a number."""


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a DeepSeek-V2 or V3 config."""
    heads = config.integer("num_attention_heads")
    config.require(
        attention_bias=False,
        mlp_bias=False,
        num_key_value_heads=heads,
        rope_interleave=True,
        moe_layer_freq=1,
    )
    if "q_lora_rank" not in config:
        raise config.wrong("q_lora_rank", None, "a whole number, or null")
    rotated, value = config.integer("qk_rope_head_dim"), config.integer("v_head_dim")
    head_dim = config.integer("qk_nope_head_dim") + rotated
    if value > head_dim:
        raise config.wrong("v_head_dim", value, f"at most {head_dim}, the size of a key")
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    spec = standard.decoder(
        config.renamed(head_dim="qk_rope_head_dim"),
        "deepseek",
        num_kv_heads=heads,
        experts=_experts(config, layers, sigmoid=architecture == "DeepseekV3ForCausalLM"),
        latent=LatentSpec(
            query_rank=config.integer("q_lora_rank", 0),
            kv_rank=config.integer("kv_lora_rank"),
            value_dim=value,
        ),
    )
    scale = head_dim**-0.5 * _magnitude(config, spec) ** 2
    return replace(spec, head_dim=head_dim, attention_scale=scale)


def _magnitude(config: ConfigReader, spec: DecoderSpec) -> float:
    """What rotation by YaRN leaves to the scores: 0.1 mscale_all_dim ln(factor) + 1."""
    section = config.section("rope_parameters") or config.section("rope_scaling")
    if section is None or spec.rope is None or spec.rope.scaling == "default":
        return 1.0
    if not section.get("mscale_all_dim") or spec.rope.factor <= 1:
        return 1.0
    found = section.number("mscale_all_dim")
    if found > MAX_MAGNITUDE:
        raise section.wrong("mscale_all_dim", found, f"numbers up to {MAX_MAGNITUDE}")
    return 0.1 * found * math.log(spec.rope.factor) + 1.0


def _experts(config: ConfigReader, layers: int, *, sigmoid: bool) -> ExpertSpec | None:
    dense = config.integer("first_k_dense_replace", least=0)
    if dense >= layers:
        return None
    if sigmoid:
        config.require(topk_method="noaux_tc", scoring_func="sigmoid")
        grouped = True
    else:
        config.require(norm_topk_prob=False, scoring_func="softmax")
        kinds = ("greedy", "group_limited_greedy")
        grouped = config.choice("topk_method", "greedy", kinds) != "greedy"
    count = config.integer("n_routed_experts")
    groups = config.integer("n_group") if grouped else 1
    if count % groups or count // groups < 1 + sigmoid:
        allowed = f"divisors of {count} experts, at least {1 + sigmoid} a group"
        raise config.wrong("n_group", groups, allowed)
    kept = config.integer("topk_group", most=groups) if grouped else 1
    inner = config.integer("moe_intermediate_size")
    return ExpertSpec(
        num_experts=count,
        per_token=config.integer("num_experts_per_tok", most=kept * (count // groups)),
        intermediate_size=inner,
        renormalize=config.flag("norm_topk_prob", sigmoid),
        shared_size=inner * config.integer("n_shared_experts"),
        shared_gated=False,
        scoring="sigmoid" if sigmoid else "softmax",
        corrected=sigmoid,
        groups=groups,
        groups_per_token=kept,
        group_best=1 + sigmoid,
        scale=config.number("routed_scaling_factor"),
        layers=tuple(range(dense, layers)),
    )


_ATTENTION, _SHARED = standard.LAYER + "self_attn.", standard.LAYER + "mlp.shared_experts."
_STEMS = {
    **standard.STEMS,
    **standard.EXPERT_STEMS,
    "query_latent": _ATTENTION + "q_a_proj",
    "query_norm": _ATTENTION + "q_a_layernorm",
    "query": _ATTENTION + "q_b_proj",
    "query_rotated": _ATTENTION + "q_b_proj",
    "key_latent": _ATTENTION + "kv_a_proj_with_mqa",
    "key_rotated": _ATTENTION + "kv_a_proj_with_mqa",
    "key_norm": _ATTENTION + "kv_a_layernorm",
    "key": _ATTENTION + "kv_b_proj",
    "value": _ATTENTION + "kv_b_proj",
    "shared_gate": _SHARED + "gate_proj",
    "shared_up": _SHARED + "up_proj",
    "shared_down": _SHARED + "down_proj",
}
_PLAIN_QUERY = dict.fromkeys(("query", "query_rotated"), _ATTENTION + "q_proj")


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    if spec.latent is None:
        raise TypeError("the model has no latent attention")
    rotated, value = spec.rotary_dim, spec.latent.value_dim
    plain = spec.head_dim - rotated
    layouts = {
        "query": Layout(run=plain, stride=spec.head_dim),
        "query_rotated": Layout(offset=plain, run=rotated, stride=spec.head_dim),
        "key_rotated": Layout(offset=spec.latent.kv_rank),
        "key": Layout(run=plain, stride=plain + value),
        "value": Layout(offset=plain, run=value, stride=plain + value),
    }
    stems = _STEMS if spec.latent.query_rank else _STEMS | _PLAIN_QUERY
    found = standard.names(spec, kind, stems, layouts=layouts, permuted_heads=True)
    correction = standard.LAYER + "mlp.gate.e_score_correction_bias"
    return dataclasses.replace(
        found,
        layers=dataclasses.replace(found.layers, router_correction=correction),
        # layers that predict further tokens stand behind the last
        ignored=(*found.ignored, f"model.layers.{spec.num_layers}."),
    )
