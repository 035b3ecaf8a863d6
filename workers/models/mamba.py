"""Mamba, FalconMamba and Mamba-2: selective state spaces, without attention or feed-forward."""

from __future__ import annotations

import dataclasses
import math

from msgspec.structs import replace

from phalanx.protos.specs import DecoderSpec, StateSpec

from . import standard
from .config import MAX_INTEGER, ConfigReader
from .layout import side_by_side
from .naming import Kind, ModelNames, model_names

MAX_CONTEXT = 2**18
"""Nothing in these models ends; this is what is served where nobody asks for less."""


def describe(config: ConfigReader, architecture: str) -> DecoderSpec:
    """The spec of a Mamba, FalconMamba or Mamba-2 config."""
    heads = architecture == "Mamba2ForCausalLM"
    config.require(hidden_act="silu", quantization_config=None)
    hidden = config.integer("hidden_size")
    inner = _inner_size(config, hidden)
    layers = config.integer("num_hidden_layers", most=standard.MAX_LAYERS)
    bias = config.flag("use_bias")
    state = StateSpec(
        inner_size=inner,
        state_size=config.integer("state_size"),
        conv_width=config.integer("conv_kernel", 4, least=2, most=64),
        conv_bias=config.flag("use_conv_bias", True),
        bias=bias,
        layers=tuple(range(layers)),
    )
    if heads:
        state = _with_heads(state, config)
    else:
        normed = architecture == "FalconMambaForCausalLM"
        state = _without_heads(state, config, hidden, normed=normed)
    return DecoderSpec(
        family="mamba2" if heads else "mamba",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=0,
        num_heads=0,
        num_kv_heads=0,
        head_dim=0,
        vocab_size=config.integer("vocab_size"),
        max_context=MAX_CONTEXT,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=config.flag("tie_word_embeddings", not heads),
        output_bias=bias,
        block="single",
        state=state,
    )


def _inner_size(config: ConfigReader, hidden: int) -> int:
    expand = config.number("expand", 2.0)
    inner = int(expand * hidden)
    if expand * hidden > MAX_INTEGER or inner < 1:
        raise config.wrong("expand", expand, f"numbers that make 1 to 2^31 of {hidden} channels")
    return inner


def _without_heads(
    state: StateSpec, config: ConfigReader, hidden: int, *, normed: bool
) -> StateSpec:
    rank = -(-hidden // 16)
    if config.get("time_step_rank") != "auto":
        rank = config.integer("time_step_rank", rank)
    eps = config.number("mixer_rms_eps", 1e-6) if normed else None
    return replace(state, step_rank=rank, inner_eps=eps)


def _with_heads(state: StateSpec, config: ConfigReader) -> StateSpec:
    heads, dim = config.integer("num_heads", 128), config.integer("head_dim", 64)
    groups = config.integer("n_groups", 8)
    if heads * dim != state.inner_size:
        raise config.wrong("num_heads", heads, f"{state.inner_size} channels / head_dim {dim}")
    if heads % groups:
        raise config.wrong("n_groups", groups, f"divisors of {heads} heads")
    low, high = _step_limit(config)
    return replace(state, heads=heads, groups=groups, min_step=low, max_step=high)


def _step_limit(config: ConfigReader) -> tuple[float, float | None]:
    values = config.get("time_step_limit")
    if values is None:
        return 0.0, None
    found = [_number(value) for value in values] if isinstance(values, list) else []
    if len(found) != 2 or not 0 <= found[0] <= found[1] or math.isinf(found[0]):
        raise config.wrong("time_step_limit", values, "two numbers, 0 <= low <= high")
    return found[0], None if math.isinf(found[1]) else found[1]


def _number(value: object) -> float:
    """A number of a config, infinite ones written as transformers does; NaN if it is none."""
    if value == {"__float__": "Infinity"}:
        return math.inf
    return float(value) if isinstance(value, int | float) else math.nan


_LAYER = "backbone.layers.{layer}."
_MIXER = _LAYER + "mixer."
_IN, _CONV = _MIXER + "in_proj", _MIXER + "conv1d"


def names(spec: DecoderSpec, kind: Kind) -> ModelNames:
    """How checkpoints of `kind` name the tensors of `spec`."""
    standard.only_safetensors(spec, kind)
    state = spec.state
    if state is None:
        raise TypeError("the model has no state spaces")
    stems = {
        "input_norm": _LAYER + "norm",
        "output": _MIXER + "out_proj",
        **dict.fromkeys(("state_x", "state_gate"), _IN),
        "conv_x": _CONV,
    }
    inner, shared = state.inner_size, state.groups * state.state_size
    if state.heads:
        stems |= dict.fromkeys(("state_b", "state_c", "state_steps"), _IN)
        stems |= {"conv_b": _CONV, "conv_c": _CONV, "state_norm": _MIXER + "norm"}
        both = {"x": inner, "b": shared, "c": shared}
        sizes = {"state_gate": inner} | {f"state_{role}": size for role, size in both.items()}
        layouts = side_by_side(sizes | {"state_steps": state.heads})
        layouts |= side_by_side({f"conv_{role}": size for role, size in both.items()})
    else:
        stems |= {"state_select": _MIXER + "x_proj", "step_weight": _MIXER + "dt_proj"}
        layouts = side_by_side({"state_x": inner, "state_gate": inner})
    found = model_names(
        spec,
        stems,
        embedding="backbone.embeddings",
        final_norm="backbone.norm_f",
        head="lm_head",
        layouts=layouts,
        prefix="backbone.",
    )
    layer = dataclasses.replace(
        found.layers,
        state_bias=f"{_IN}.bias" if state.bias else None,
        conv_bias=f"{_CONV}.bias" if state.conv_bias else None,
        step_bias=_MIXER + ("dt_bias" if state.heads else "dt_proj.bias"),
        state_decay=_MIXER + "A_log",
        state_skip=_MIXER + "D",
    )
    return dataclasses.replace(found, layers=layer)
