"""Positions as data: rotary rules, ALiBi slopes, sliding windows. Read from a config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

from phalanx.protos.specs import RopeSpec, Scaling

from .config import ConfigReader

_ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("truncate", _ORIGINAL),
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL),
}
_ROPE_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
MAX_DYNAMIC_FACTOR = 1024
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(
    config: ConfigReader,
    head_dim: int,
    max_context: int,
    *,
    partial: float | None = None,
    theta: float = 10000.0,
    types: dict[str, str] | None = None,
) -> RopeSpec:
    """The rotation, from both forms: `rope_parameters`, and `rope_scaling` beside `rope_theta`.

    `partial` is the part of a head that is rotated unless the config says otherwise, None where
    the family rotates all of it; `theta` the family's base; `types` its own names of rules.
    """
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    if new and old and config.get("rope_parameters") != config.get("rope_scaling"):
        raise config.wrong(
            "rope_scaling", config.get("rope_scaling"), "null beside rope_parameters"
        )
    section = new or old or ConfigReader({}, "rope")
    return rule(section, config, head_dim, max_context, partial=partial, theta=theta, types=types)


def rule(
    section: ConfigReader,
    config: ConfigReader,
    head_dim: int,
    max_context: int,
    *,
    partial: float | None = None,
    theta: float = 10000.0,
    types: dict[str, str] | None = None,
) -> RopeSpec:
    """The rotation of one section of rope parameters, see `rope`."""
    types = types or {}
    field = "type" if section.get("rope_type") is None else "rope_type"
    scaling = section.choice(field, "default", [*ROPE_FIELDS, *types])
    scaling = types.get(scaling, scaling)
    # released configs carry the numbers of other rules beside "default"; they mean nothing there
    known = ROPE_FIELDS["llama3" if scaling == "default" else scaling]
    if scaling == "default":
        known = (*known, "short_factor", "long_factor")
    section.only([*_ROPE_ALWAYS, *known])
    base = section.number("rope_theta", config.number("rope_theta", theta))
    if base <= 1:
        reader = config if section.get("rope_theta") is None else section
        raise reader.wrong("rope_theta", base, "numbers above 1")
    rotary_dim = _rotary_dim(section, config, head_dim, partial)
    numbers = _NUMBERS.get(scaling, _plain)(section, config, max_context, rotary_dim)
    return RopeSpec(theta=base, rotary_dim=rotary_dim, scaling=cast(Scaling, scaling), **numbers)


def ropes(
    config: ConfigReader, head_dim: int, max_context: int, *, theta: float, local_theta: float
) -> dict[str, Any]:
    """`rope` and `local_rope` of a model whose sliding layers rotate in their own way.

    Nested by the kind of layer, or, in older configs, one section that holds for the full layers.
    """
    parameters = config.section("rope_parameters")
    local = None
    if parameters is not None and (FULL in parameters or SLIDING in parameters):
        parameters.only((FULL, SLIDING))
        whole, local = parameters.section(FULL), parameters.section(SLIDING)
    else:
        whole = parameters or config.section("rope_scaling")
    empty = ConfigReader({}, "rope")
    return {
        "rope": rule(whole or empty, config, head_dim, max_context, theta=theta),
        "local_rope": rule(local or empty, empty, head_dim, max_context, theta=local_theta),
    }


def _rotary_dim(
    section: ConfigReader, config: ConfigReader, head_dim: int, partial: float | None
) -> int:
    field = "partial_rotary_factor"
    if partial is None:
        for reader in (section, config):
            if reader.number(field, 1.0) != 1.0:
                raise reader.wrong(field, reader.get(field), "1")
        return head_dim
    part = section.number(field, config.number(field, partial))
    rotary_dim = int(head_dim * part)
    if part > 1 or rotary_dim < 2 or rotary_dim % 2:
        reader = config if section.get(field) is None else section
        raise reader.wrong(field, part, f"parts of head_dim ({head_dim}) that are even numbers")
    return rotary_dim


def _plain(section: ConfigReader, *_: object) -> dict[str, Any]:
    return {}


def _stretched(section: ConfigReader, *_: object) -> dict[str, Any]:
    return {"factor": section.number("factor")}


def _dynamic(
    section: ConfigReader, config: ConfigReader, max_context: int, rotary_dim: int
) -> dict[str, Any]:
    if rotary_dim < 4:
        raise section.wrong("rope_type", "dynamic", "other rules where 2 elements are rotated")
    factor = section.number("factor")
    if not 1 <= factor <= MAX_DYNAMIC_FACTOR:
        raise section.wrong("factor", factor, f"numbers from 1 to {MAX_DYNAMIC_FACTOR}")
    return {"factor": factor, "original_max_position": max_context}


def _original(section: ConfigReader, config: ConfigReader, max_context: int) -> int:
    # beside the section it wins over inside it, as in transformers
    return config.integer(_ORIGINAL, section.integer(_ORIGINAL, max_context, least=2), least=2)


def _llama3(
    section: ConfigReader, config: ConfigReader, max_context: int, rotary_dim: int
) -> dict[str, Any]:
    factor = section.number("factor")
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if not low < high:
        raise section.wrong("high_freq_factor", high, f"numbers above low_freq_factor ({low})")
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position": _original(section, config, max_context),
    }


def _yarn(
    section: ConfigReader, config: ConfigReader, max_context: int, rotary_dim: int
) -> dict[str, Any]:
    original = _original(section, config, max_context)
    factor = section.number("factor", max_context / original)
    fast, slow = section.number("beta_fast", 32.0), section.number("beta_slow", 1.0)
    if not slow < fast:
        raise section.wrong("beta_fast", fast, f"numbers above beta_slow ({slow})")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = magnitude(1.0)
    if section.get("mscale") and section.get("mscale_all_dim"):
        attention = magnitude(section.number("mscale")) / magnitude(
            section.number("mscale_all_dim")
        )
    return {
        "factor": factor,
        "original_max_position": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": section.flag("truncate", True),
        "attention_factor": section.number("attention_factor", attention),
    }


def _longrope(
    section: ConfigReader, config: ConfigReader, max_context: int, rotary_dim: int
) -> dict[str, Any]:
    original = _original(section, config, max_context)
    factor = section.number("factor", max_context / original)
    attention = 1.0
    if factor > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factor": factor,
        "original_max_position": original,
        "attention_factor": section.number("attention_factor", attention),
        "short_factor": section.numbers("short_factor", rotary_dim // 2),
        "long_factor": section.numbers("long_factor", rotary_dim // 2),
    }


_NUMBERS: dict[str, Callable[[ConfigReader, ConfigReader, int, int], dict[str, Any]]] = {
    "linear": _stretched,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def windows(config: ConfigReader, layers: int, pattern: int | None = None) -> tuple[int, ...]:
    """Tokens that each layer sees, empty where all see all.

    Layers are sliding by `layer_types`, else all but every `pattern`-th (all, where None).
    """
    if config.get("sliding_window") is None:
        return ()
    window = config.integer("sliding_window")
    types = config.get("layer_types")
    if types is None:
        types = [
            FULL if pattern is not None and (index + 1) % pattern == 0 else SLIDING
            for index in range(layers)
        ]
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {SLIDING, FULL}:
        raise config.wrong("layer_types", types, f"{layers} times {SLIDING} or {FULL}")
    found = tuple(window if name == SLIDING else 0 for name in types)
    return found if any(found) else ()


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slope of every head (Press 2022), as in BLOOM.

    A power of two n gives 2 ** (-8 i / n); other counts take the rest from the odd places of the
    next power of two.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (index + 1) / below) for index in range(below)]
    extra = [2.0 ** (-4 * (2 * index + 1) / below) for index in range(heads - below)]
    return tuple(slopes + extra)
