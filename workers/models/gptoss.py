"""gpt-oss: attention sinks, alternating windows, and experts with biases and clamped gates."""

from __future__ import annotations

import dataclasses

from phalanx.protos.specs import DecoderSpec, ExpertSpec

from . import standard
from .config import ConfigReader
from .layout import Layout
from .naming import Kind, ModelNames
from .positions import windows


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a gpt-oss config."""
    quantization = config.section("quantization_config")
    if quantization is not None:
        allowed = "null: weights that are stored as numbers, in bfloat16 or wider"
        raise quantization.wrong("quant_method", quantization.get("quant_method"), allowed)
    config.require(swiglu_alpha=1.702)  # the activation's factor
    if config.section("rope_parameters") is None and config.section("rope_scaling") is None:
        raise config.wrong("rope_scaling", None, "an object; the model was made with one")
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    config = config.renamed(num_local_experts="num_experts")
    count = config.integer("num_local_experts")
    bias = config.flag("attention_bias", True)
    return standard.decoder(
        config,
        "gpt_oss",
        theta=150000.0,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        activation="gelu_quick",
        attention_bias=bias,
        output_bias=bias,
        attention_sinks=True,
        windows=windows(config, layers, pattern=2),
        experts=ExpertSpec(
            num_experts=count,
            per_token=config.integer("num_experts_per_tok", 4, most=count),
            intermediate_size=config.integer("intermediate_size"),
            renormalize=True,
            biased=True,
            limit=config.number("swiglu_limit", 7.0),
            layers=tuple(range(layers)),
        ),
    )


_STEMS = standard.STEMS | {"router": standard.LAYER + "mlp.router"}
_GATE_UP = standard.LAYER + "mlp.experts.gate_up_proj"
_DOWN = standard.LAYER + "mlp.experts.down_proj"
_LAYOUTS = {
    "expert_gate": Layout(run=1, stride=2, transposed=True, entry=0),
    "expert_up": Layout(offset=1, run=1, stride=2, transposed=True, entry=0),
    "expert_down": Layout(transposed=True, entry=0),
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    found = standard.names(spec, kind, _STEMS, layouts=_LAYOUTS)
    layers = dataclasses.replace(
        found.layers,
        sinks=standard.LAYER + "self_attn.sinks",
        router_bias=standard.LAYER + "mlp.router.bias",
        expert_gate=_GATE_UP,
        expert_up=_GATE_UP,
        expert_down=_DOWN,
        expert_gate_bias=_GATE_UP + "_bias",
        expert_up_bias=_GATE_UP + "_bias",
        expert_down_bias=_DOWN + "_bias",
    )
    return dataclasses.replace(found, layers=layers)
