"""ChatGLM2, ChatGLM3 and GLM-4-9B as first released: GLM under other names.

Half of each head is rotated, in neighbouring pairs; queries, keys and values lie in one tensor, gate
and up projection in another (Du 2022; GLM team 2024).
"""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames, model_names

_FIELDS = {
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels",
    "num_key_value_heads": "multi_query_group_num",
    "vocab_size": "padded_vocab_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a ChatGLM config."""
    config = config.renamed(**_FIELDS)
    config.require(rmsnorm=True, post_layer_norm=True, original_rope=True, quantization_bit=0)
    config.require(position_encoding_2d=False, pre_seq_len=None, vision_config=None)
    config.require(apply_residual_connection_post_layernorm=False)
    if not config.flag("multi_query_attention"):
        raise config.wrong("multi_query_attention", config.get("multi_query_attention"), "true")
    ratio = config.number("rope_ratio", 1.0)
    if ratio != 1 and "classifier_dropout" not in config:  # a field of all but ChatGLM2
        raise config.wrong("rope_ratio", ratio, "1 for ChatGLM2, which divides positions by it")
    biases = config.flag("add_bias_linear")
    return standard.decoder(
        config,
        "chatglm",
        partial=0.5,
        theta=10000.0 * ratio,
        num_kv_heads=config.integer("num_key_value_heads", 1),
        attention_bias=biases or config.flag("add_qkv_bias"),
        output_bias=biases,
        mlp_bias=biases,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        activation="silu",
    )


_LAYER = "transformer.encoder.layers.{layer}."
_STEMS = {
    "input_norm": _LAYER + "input_layernorm",
    "query": _LAYER + "self_attention.query_key_value",
    "key": _LAYER + "self_attention.query_key_value",
    "value": _LAYER + "self_attention.query_key_value",
    "output": _LAYER + "self_attention.dense",
    "post_norm": _LAYER + "post_attention_layernorm",
    "gate": _LAYER + "mlp.dense_h_to_4h",
    "up": _LAYER + "mlp.dense_h_to_4h",
    "down": _LAYER + "mlp.dense_4h_to_h",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    return model_names(
        spec,
        _STEMS,
        embedding="transformer.embedding.word_embeddings",
        final_norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        layouts=standard.fused_qkv(spec) | standard.fused_gate_up(spec),
        permuted_heads=True,
        ignored=("transformer.rotary_pos_emb.",),
        prefix="transformer.",
    )
