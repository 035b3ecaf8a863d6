"""StableLM: layer norms, partly rotated heads, gated SiLU; the 12B model norms every head."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a StableLM config."""
    return standard.decoder(
        config.renamed(rms_norm_eps="layer_norm_eps"),
        "stablelm",
        partial=0.25,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        attention_bias=config.flag("use_qkv_bias"),
        qk_norm="each" if config.flag("qk_layernorm") else "none",
        block="parallel" if config.flag("use_parallel_residual") else "pre",
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    stems = standard.STEMS | {
        "query_norm": standard.LAYER + "self_attn.q_layernorm.norms.{head}",
        "key_norm": standard.LAYER + "self_attn.k_layernorm.norms.{head}",
    }
    return standard.names(spec, kind, stems)
