"""The fields and names that most families share, in the words of Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx.protos.errors import ModelError
from phalanx.protos.specs import Activation, DecoderSpec

from .config import ConfigReader
from .layout import NO_LAYOUTS, Layout, Layouts, side_by_side
from .naming import Kind, ModelNames, model_names
from .positions import rope

MAX_LAYERS = 4096
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu2",
}


def decoder(
    config: ConfigReader,
    family: str,
    *,
    tied: bool = False,
    partial: float | None = None,
    theta: float = 10000.0,
    rope_types: dict[str, str] | None = None,
    **fields: Any,
) -> DecoderSpec:
    """The spec of a config; `fields` are those of `DecoderSpec` that are not to be read from it.

    `tied` is what holds where the config does not say; `partial`, `theta` and `rope_types` go to
    `positions.rope`. Without `rope=None` the family rotates.
    """
    config.require(quantization_config=None, add_cross_attention=False, is_encoder_decoder=False)
    hidden = config.integer("hidden_size")
    heads, kv_heads, head_dim = _heads(config, hidden, fields.pop("num_kv_heads", None))
    max_context = fields.pop("max_context", None) or config.integer("max_position_embeddings")
    ties = config.flag("tie_word_embeddings", tied)
    if ties and fields.get("head_bias"):
        raise config.wrong("tie_word_embeddings", ties, "false with a bias on the head")
    read: dict[str, Any] = {}
    if "rope" not in fields:
        read["rope"] = rope(
            config, head_dim, max_context, partial=partial, theta=theta, types=rope_types
        )
        if head_dim % 2:
            raise config.wrong("head_dim", head_dim, "even numbers above 0")
    if "intermediate_size" not in fields:
        read["intermediate_size"] = config.integer("intermediate_size")
    if "activation" not in fields:
        read["activation"] = activation(config)
    if "norm_eps" not in fields:
        read["norm_eps"] = config.number("rms_norm_eps", 1e-6)
    return DecoderSpec(
        family=family,
        num_layers=config.integer("num_hidden_layers", most=MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size"),
        max_context=max_context,
        tie_embeddings=ties,
        **read,
        **fields,
    )


def _heads(config: ConfigReader, hidden: int, kv_heads: int | None) -> tuple[int, int, int]:
    """(query heads, key/value heads, size of a head)."""
    heads = config.integer("num_attention_heads")
    if kv_heads is None:
        kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", kv_heads, f"divisors of {heads} attention heads")
    if config.get("head_dim") is None and hidden % heads:
        raise config.wrong("hidden_size", hidden, f"multiples of {heads} heads, or set head_dim")
    return heads, kv_heads, config.integer("head_dim", hidden // heads)


def activation(
    config: ConfigReader, field: str = "hidden_act", default: str = "silu"
) -> Activation:
    """The activation function under the name that the kernels know."""
    return ACTIVATIONS[config.choice(field, default, ACTIVATIONS)]


LAYER = "model.layers.{layer}."
STEMS = {
    "input_norm": LAYER + "input_layernorm",
    "query": LAYER + "self_attn.q_proj",
    "key": LAYER + "self_attn.k_proj",
    "value": LAYER + "self_attn.v_proj",
    "query_norm": LAYER + "self_attn.q_norm",
    "key_norm": LAYER + "self_attn.k_norm",
    "output": LAYER + "self_attn.o_proj",
    "post_norm": LAYER + "post_attention_layernorm",
    "gate": LAYER + "mlp.gate_proj",
    "up": LAYER + "mlp.up_proj",
    "down": LAYER + "mlp.down_proj",
}
EXPERT_STEMS = {
    "router": LAYER + "mlp.gate",
    "expert_gate": LAYER + "mlp.experts.{expert}.gate_proj",
    "expert_up": LAYER + "mlp.experts.{expert}.up_proj",
    "expert_down": LAYER + "mlp.experts.{expert}.down_proj",
}
GGUF_STEMS = {
    "input_norm": "blk.{layer}.attn_norm",
    "query": "blk.{layer}.attn_q",
    "key": "blk.{layer}.attn_k",
    "value": "blk.{layer}.attn_v",
    "query_norm": "blk.{layer}.attn_q_norm",
    "key_norm": "blk.{layer}.attn_k_norm",
    "output": "blk.{layer}.attn_output",
    "post_norm": "blk.{layer}.ffn_norm",
    "gate": "blk.{layer}.ffn_gate",
    "up": "blk.{layer}.ffn_up",
    "down": "blk.{layer}.ffn_down",
}


def names(
    spec: DecoderSpec,
    kind: Kind,
    stems: Mapping[str, str] = STEMS,
    *,
    final_norm: str = "model.norm",
    layouts: Layouts = NO_LAYOUTS,
    permuted_heads: bool = False,
) -> ModelNames:
    """Names of a safetensors checkpoint whose parts outside the layers are called as Llama's."""
    only_safetensors(spec, kind)
    # older exports keep the rotary frequencies
    rotary = [f"model.layers.{index}.self_attn.rotary_emb." for index in range(spec.num_layers)]
    return model_names(
        spec,
        stems,
        embedding="model.embed_tokens",
        final_norm=final_norm,
        head="lm_head",
        layouts=layouts,
        permuted_heads=permuted_heads,
        ignored=tuple(rotary),
    )


def gguf_names(
    spec: DecoderSpec,
    stems: Mapping[str, str] = GGUF_STEMS,
    *,
    layouts: Layouts = NO_LAYOUTS,
    permuted_heads: bool = False,
) -> ModelNames:
    """Names of a GGUF file."""
    return model_names(
        spec,
        stems,
        embedding="token_embd",
        final_norm="output_norm",
        head="output",
        layouts=layouts,
        permuted_heads=permuted_heads,
        ignored=("rope_freqs.weight",),  # read into the spec's rope scaling
    )


def only_safetensors(spec: DecoderSpec, kind: Kind) -> None:
    """Refuse a kind of checkpoint that the family's names are not known for."""
    if kind != "safetensors":
        raise ModelError(
            f"family {spec.family}: {kind} checkpoints are not supported, safetensors are"
        )


def fused_qkv(spec: DecoderSpec) -> dict[str, Layout]:
    """All query heads, then all key heads, then all value heads, in one tensor."""
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return side_by_side({"query": query, "key": kv, "value": kv})


def fused_gate_up(spec: DecoderSpec) -> dict[str, Layout]:
    """The gate, then the up projection, in one tensor."""
    return side_by_side({"gate": spec.intermediate_size, "up": spec.intermediate_size})
