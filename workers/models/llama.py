"""The Llama family: Llama 1 to 3.3, SmolLM2 and every model of that shape, Mistral included.

Pre-norm, grouped-query attention with rotary positions, gated SiLU feed-forward.
"""

from __future__ import annotations

from typing import Literal, cast

from phalanx.protos.specs import DecoderSpec, RopeSpec
from phalanx.workers.checkpoint.slices import Array

from .config import ConfigReader
from .registry import Kind, LayerNames, ModelNames

MAX_LAYERS = 4096
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_ROPE_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Llama or Mistral config."""
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.wrong("num_key_value_heads", kv_heads, f"divisors of {heads} attention heads")
    if config.get("head_dim") is None and hidden % heads:
        raise config.wrong("hidden_size", hidden, f"multiples of {heads} heads, or set head_dim")
    head_dim = config.integer("head_dim", hidden // heads)
    if head_dim % 2 or not head_dim:
        raise config.wrong("head_dim", head_dim, "even numbers above 0")
    if config.get("quantization_config") is not None:
        raise config.wrong("quantization_config", "set", "plain weights only (no such field)")
    config.choice("hidden_act", "silu", ["silu", "swish"])
    max_context = config.integer("max_position_embeddings")
    _check_window(config, architecture, max_context)
    attention_bias = config.flag("attention_bias")
    return DecoderSpec(
        family="llama",
        num_layers=config.integer("num_hidden_layers", most=MAX_LAYERS),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=config.integer("vocab_size"),
        max_context=max_context,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_rope(config, head_dim, max_context),
        tie_embeddings=config.flag("tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=config.flag("attention_output_bias", attention_bias),
        mlp_bias=config.flag("mlp_bias"),
    )


def _check_window(config: ConfigReader, architecture: str, max_context: int) -> None:
    """Mistral reads an absent window as 4096 (transformers' default), null as none."""
    if architecture != "MistralForCausalLM":
        return
    absent = "sliding_window" not in config
    window = 4096 if absent else config.integer("sliding_window", max_context)
    if window < max_context:
        raise config.wrong(
            "sliding_window",
            window,
            f"null, or at least max_position_embeddings ({max_context}); sliding-window attention "
            "is not supported",
        )


def _rope(config: ConfigReader, head_dim: int, max_context: int) -> RopeSpec:
    """Both forms: `rope_parameters`, and the older `rope_scaling` beside `rope_theta`."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new and old and config.get("rope_parameters") != config.get("rope_scaling"):
        raise config.wrong(
            "rope_scaling", config.get("rope_scaling"), "null beside rope_parameters"
        )
    rope = new or old or ConfigReader({}, "rope")
    field = "type" if rope.get("rope_type") is None else "rope_type"
    scaling = rope.choice(field, "default", ROPE_FIELDS)
    # released configs carry the numbers of other rules beside "default"; they mean nothing there
    rope.only([*_ROPE_ALWAYS, *ROPE_FIELDS["llama3" if scaling == "default" else scaling]])
    for section in (rope, config):
        if section.number("partial_rotary_factor", 1.0) != 1.0:
            raise section.wrong("partial_rotary_factor", section.get("partial_rotary_factor"), "1")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    spec = RopeSpec(theta=theta, rotary_dim=head_dim)
    if scaling == "default":
        return spec
    factor = rope.number("factor")
    if scaling == "linear":
        return RopeSpec(theta=theta, rotary_dim=head_dim, scaling="linear", factor=factor)
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise rope.wrong("high_freq_factor", high, f"numbers above low_freq_factor ({low})")
    original = "original_max_position_embeddings"
    return RopeSpec(
        theta=theta,
        rotary_dim=head_dim,
        scaling=cast(Literal["llama3"], scaling),
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        # beside the section it wins over inside it, as in transformers
        original_max_position=config.integer(original, rope.integer(original, max_context)),
    )


_LAYER = "model.layers.{layer}."
_SAFETENSORS = {
    "input_norm": _LAYER + "input_layernorm",
    "query": _LAYER + "self_attn.q_proj",
    "key": _LAYER + "self_attn.k_proj",
    "value": _LAYER + "self_attn.v_proj",
    "output": _LAYER + "self_attn.o_proj",
    "post_norm": _LAYER + "post_attention_layernorm",
    "gate": _LAYER + "mlp.gate_proj",
    "up": _LAYER + "mlp.up_proj",
    "down": _LAYER + "mlp.down_proj",
}
_GGUF = {
    "input_norm": "blk.{layer}.attn_norm",
    "query": "blk.{layer}.attn_q",
    "key": "blk.{layer}.attn_k",
    "value": "blk.{layer}.attn_v",
    "output": "blk.{layer}.attn_output",
    "post_norm": "blk.{layer}.ffn_norm",
    "gate": "blk.{layer}.ffn_gate",
    "up": "blk.{layer}.ffn_up",
    "down": "blk.{layer}.ffn_down",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    tied = spec.tie_embeddings
    if kind == "gguf":
        return ModelNames(
            embedding="token_embd.weight",
            final_norm="output_norm.weight",
            head="token_embd.weight" if tied else "output.weight",
            layers=_layer_names(_GGUF, spec),
            permuted_heads=True,
            ignored=("rope_freqs.weight",),  # read into the spec's rope scaling
        )
    # older exports keep the rotary frequencies, tied ones sometimes a copy of the embedding
    rotary = [f"model.layers.{index}.self_attn.rotary_emb." for index in range(spec.num_layers)]
    return ModelNames(
        embedding="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        head="model.embed_tokens.weight" if tied else "lm_head.weight",
        layers=_layer_names(_SAFETENSORS, spec),
        ignored=("lm_head.weight", *rotary) if tied else tuple(rotary),
    )


def _layer_names(stems: dict[str, str], spec: DecoderSpec) -> LayerNames:
    biased = {
        "query": spec.attention_bias,
        "key": spec.attention_bias,
        "value": spec.attention_bias,
        "output": spec.output_bias,
        "gate": spec.mlp_bias,
        "up": spec.mlp_bias,
        "down": spec.mlp_bias,
    }
    weights = {role: f"{stem}.weight" for role, stem in stems.items()}
    biases = {f"{role}_bias": f"{stems[role]}.bias" for role, has in biased.items() if has}
    return LayerNames(**weights, **biases)


def unpermute_heads(rows: Array, head_dim: int) -> Array:
    """Query or key rows from interleaved order to halves: [heads * head_dim, ...], same shape.

    llama.cpp's converter stores row 2i of a head from row i of its first half and row 2i + 1 from
    row i of its second half, so that rotated pairs are neighbours. Any whole number of heads may
    be given; a bias (one dimension) is treated alike.
    """
    if rows.shape[0] % head_dim:
        raise ValueError(f"{rows.shape[0]} rows are not whole heads of {head_dim}")
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
