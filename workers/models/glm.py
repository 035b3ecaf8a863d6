"""GLM-4: half of each head rotated, in neighbouring pairs; gate and up in one tensor.

`Glm4ForCausalLM` (GLM-4-0414) also norms what each block gives.
"""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a GLM config."""
    sandwich = architecture == "Glm4ForCausalLM"
    return standard.decoder(
        config,
        "glm4" if sandwich else "glm",
        partial=0.5,
        attention_bias=config.flag("attention_bias", True),
        block="sandwich" if sandwich else "pre",
    )


_FUSED = standard.STEMS | {
    "gate": standard.LAYER + "mlp.gate_up_proj",
    "up": standard.LAYER + "mlp.gate_up_proj",
    "attention_norm": standard.LAYER + "post_self_attn_layernorm",
    "mlp_norm": standard.LAYER + "post_mlp_layernorm",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    layouts = standard.fused_gate_up(spec)
    return standard.names(spec, kind, _FUSED, layouts=layouts, permuted_heads=True)
