"""Phi-3 and Phi-4 (fused projections, LongRoPE), and Phi-1 to Phi-2 (parallel block)."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames
from .positions import windows

_LONG = {"su": "longrope", "yarn": "longrope"}  # older configs call it so


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Phi config."""
    if architecture == "Phi3ForCausalLM":
        config.require(attention_bias=False)
        layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
        return standard.decoder(
            config, "phi3", partial=1.0, rope_types=_LONG, windows=windows(config, layers)
        )
    config.require(qk_layernorm=False)
    return standard.decoder(
        config.renamed(rms_norm_eps="layer_norm_eps"),
        "phi",
        partial=0.5,
        norm="layer",
        norm_bias=True,
        block="parallel",
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        activation=standard.activation(config, default="gelu_new"),
    )


_FUSED = standard.STEMS | {
    "query": standard.LAYER + "self_attn.qkv_proj",
    "key": standard.LAYER + "self_attn.qkv_proj",
    "value": standard.LAYER + "self_attn.qkv_proj",
    "gate": standard.LAYER + "mlp.gate_up_proj",
    "up": standard.LAYER + "mlp.gate_up_proj",
}
_FIRST = standard.STEMS | {
    "output": standard.LAYER + "self_attn.dense",
    "up": standard.LAYER + "mlp.fc1",
    "down": standard.LAYER + "mlp.fc2",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    if spec.family == "phi":
        return standard.names(spec, kind, _FIRST, final_norm="model.final_layernorm")
    fused = standard.fused_qkv(spec) | standard.fused_gate_up(spec)
    return standard.names(spec, kind, _FUSED, layouts=fused)
