"""GPT-Neo: local layers between global ones, learned positions, scores that are not scaled."""

from __future__ import annotations

from phalanx.protos.specs import DecoderSpec

from . import standard
from .config import ConfigReader
from .naming import Kind, ModelNames, model_names

_FIELDS = {
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "hidden_act": "activation_function",
}


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a GPT-Neo config."""
    config = config.renamed(**_FIELDS)
    return standard.decoder(
        config,
        "gpt_neo",
        tied=True,
        rope=None,
        num_kv_heads=config.integer("num_attention_heads"),
        intermediate_size=config.integer("intermediate_size", 4 * config.integer("hidden_size")),
        learned_positions=True,
        windows=_windows(config),
        attention_scale=1.0,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        gated_mlp=False,
        output_bias=True,
        mlp_bias=True,
        activation=standard.activation(config, default="gelu_new"),
    )


def _windows(config: ConfigReader) -> tuple[int, ...]:
    """`attention_types` lists patterns and how often each is repeated."""
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    window, types = config.integer("window_size", 256), config.get("attention_types")
    wrong = config.wrong(
        "attention_types", types, f'[[["global", "local"], n]] for {layers} layers'
    )
    if not isinstance(types, list):
        raise wrong
    kinds: list[object] = []
    for item in types:
        if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], list):
            raise wrong
        if not isinstance(item[1], int) or not 0 < item[1] <= layers:
            raise wrong
        kinds += item[0] * item[1]
    if len(kinds) != layers or any(kind not in ("global", "local") for kind in kinds):
        raise wrong
    return tuple(window if kind == "local" else 0 for kind in kinds)


_LAYER = "transformer.h.{layer}."
_STEMS = {
    "input_norm": _LAYER + "ln_1",
    "query": _LAYER + "attn.attention.q_proj",
    "key": _LAYER + "attn.attention.k_proj",
    "value": _LAYER + "attn.attention.v_proj",
    "output": _LAYER + "attn.attention.out_proj",
    "post_norm": _LAYER + "ln_2",
    "up": _LAYER + "mlp.c_fc",
    "down": _LAYER + "mlp.c_proj",
}


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    layers = [f"transformer.h.{index}.attn.attention." for index in range(spec.num_layers)]
    return model_names(
        spec,
        _STEMS,
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
        ignored=tuple(layer + name for layer in layers for name in ("bias", "masked_bias")),
        prefix="transformer.",
    )
