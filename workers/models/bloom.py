"""BLOOM: ALiBi, a norm on the embedding, fused heads of query, key and value."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .layout import grouped_heads
from .naming import Kind, ModelNames, model_names
from .positions import alibi_slopes

_LAYER = "transformer.h.{layer}."
_FUSED = _LAYER + "self_attention.query_key_value"
_STEMS = {
    "input_norm": _LAYER + "input_layernorm",
    "query": _FUSED,
    "key": _FUSED,
    "value": _FUSED,
    "output": _LAYER + "self_attention.dense",
    "post_norm": _LAYER + "post_attention_layernorm",
    "up": _LAYER + "mlp.dense_h_to_4h",
    "down": _LAYER + "mlp.dense_4h_to_h",
}
_FIELDS = {
    "hidden_size": "n_embed",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a BLOOM config; without `seq_length`, 2048 tokens as all were trained on."""
    config = config.renamed(**_FIELDS)
    config.require(apply_residual_connection_post_layernorm=False)
    return standard.decoder(
        config,
        "bloom",
        tied=True,
        rope=None,
        max_context=config.integer("seq_length", 2048),
        intermediate_size=4 * config.integer("hidden_size"),
        alibi_slopes=alibi_slopes(config.integer("num_attention_heads")),
        embedding_norm=True,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation="gelu_tanh",
    )


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    return model_names(
        spec,
        _STEMS,
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        head="lm_head",
        layouts=grouped_heads(1, spec.head_dim),
        prefix="transformer.",
    )
