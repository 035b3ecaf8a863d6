"""OPT: learned positions that start at row 2, ReLU, a bias everywhere."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames, model_names


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of an OPT config; the 350M model, with its norms after the sums, is refused."""
    config.require(
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        word_embed_proj_dim=config.integer("hidden_size"),
    )
    bias = config.flag("enable_bias", True)
    affine = config.flag("layer_norm_elementwise_affine", True)
    return standard.decoder(
        config.renamed(intermediate_size="ffn_dim", hidden_act="activation_function"),
        "opt",
        tied=True,
        rope=None,
        learned_positions=True,
        position_offset=2,
        norm="layer",
        norm_eps=1e-5,
        norm_affine=affine,
        norm_bias=affine,
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


_LAYER = "model.decoder.layers.{layer}."
_STEMS = {
    "input_norm": _LAYER + "self_attn_layer_norm",
    "query": _LAYER + "self_attn.q_proj",
    "key": _LAYER + "self_attn.k_proj",
    "value": _LAYER + "self_attn.v_proj",
    "output": _LAYER + "self_attn.out_proj",
    "post_norm": _LAYER + "final_layer_norm",
    "up": _LAYER + "fc1",
    "down": _LAYER + "fc2",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    return model_names(
        spec,
        _STEMS,
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        prefix="model.",
    )
