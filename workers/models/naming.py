"""How a checkpoint names its tensors, as templates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from phalanx.protos.specs import DecoderSpec

from .layout import NO_LAYOUTS, Layouts

Kind = Literal["safetensors", "gguf"]


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Checkpoint names of one layer's tensors.

    A bias that the model lacks is None; other tensors that it lacks have no meaning. The bias of
    a norm is named as its weight, with "bias" for "weight". `query_norm` and `key_norm` may hold
    `{head}`, the expert names hold `{expert}`.
    """

    input_norm: str = ""
    query: str = ""
    key: str = ""
    value: str = ""
    query_latent: str = ""
    """What queries are made from; `query_norm` is its norm."""
    query_rotated: str = ""
    """The rotated part of query heads, where it is a projection of its own."""
    key_latent: str = ""
    """What keys and values are made from; `key_norm` is its norm."""
    key_rotated: str = ""
    query_norm: str = ""
    key_norm: str = ""
    sinks: str = ""
    """The score of each query head's sink."""
    output: str = ""
    attention_norm: str = ""
    """Of what the attention block gives."""
    post_norm: str = ""
    """Of what the feed-forward block takes."""
    gate: str = ""
    up: str = ""
    down: str = ""
    router: str = ""
    router_correction: str = ""
    expert_gate: str = ""
    expert_up: str = ""
    expert_down: str = ""
    shared_router: str = ""
    shared_gate: str = ""
    shared_up: str = ""
    shared_down: str = ""
    state_x: str = ""
    """Channels of a state space; its other projections are named as in `StateSpec`."""
    state_gate: str = ""
    state_b: str = ""
    state_c: str = ""
    state_steps: str = ""
    state_select: str = ""
    """From channels to what steps are made from, b and c, where those come from channels."""
    step_weight: str = ""
    """From there to steps."""
    step_bias: str = ""
    conv_x: str = ""
    """Convolution of the channels, of b and of c."""
    conv_b: str = ""
    conv_c: str = ""
    state_decay: str = ""
    """log(-a)"""
    state_skip: str = ""
    state_norm: str = ""
    mlp_norm: str = ""
    """Of what the feed-forward block gives."""
    query_bias: str | None = None
    key_bias: str | None = None
    value_bias: str | None = None
    output_bias: str | None = None
    gate_bias: str | None = None
    up_bias: str | None = None
    down_bias: str | None = None
    state_bias: str | None = None
    """Of the projections into a state space."""
    conv_bias: str | None = None
    router_bias: str | None = None
    expert_gate_bias: str | None = None
    expert_up_bias: str | None = None
    expert_down_bias: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """Checkpoint names of a model's tensors.

    `layers` holds templates with `{layer}`. `layouts`: how the tensors of a role are stored where
    that is not plainly. `permuted_heads`: query and key rows are stored for interleaved rotation,
    see `layout.unpermute_heads`. `ignored`: prefixes of tensors that a checkpoint may hold and the
    model does not need. `prefix` is missing from all names where the model was saved without its
    head. A tied model's `head` is its embedding.
    """

    embedding: str
    final_norm: str
    head: str
    layers: LayerNames
    head_bias: str | None = None
    positions: str = ""
    embedding_norm: str = ""
    layouts: Layouts = field(default_factory=dict)
    permuted_heads: bool = False
    ignored: tuple[str, ...] = ()
    prefix: str = ""

    def layer(self, index: int) -> LayerNames:
        """Names of layer `index`."""
        return _each(self.layers, lambda name: name.replace("{layer}", str(index)))

    def found_in(self, present: Collection[str]) -> ModelNames:
        """The names as this checkpoint writes them, with or without `prefix`."""
        prefix = self.prefix
        if not prefix or any(name.startswith(prefix) for name in present):
            return self
        return replace(
            _each(self, lambda name: name.removeprefix(prefix)),
            prefix="",
            layers=_each(self.layers, lambda name: name.removeprefix(prefix)),
            ignored=tuple(name.removeprefix(prefix) for name in self.ignored),
        )


_Names = TypeVar("_Names", LayerNames, ModelNames)


def _each(names: _Names, change: Callable[[str], str]) -> _Names:
    """`names` with every text changed."""
    texts = {item.name: getattr(names, item.name) for item in fields(names)}
    changed: dict[str, Any] = {
        name: change(text) for name, text in texts.items() if isinstance(text, str)
    }
    return replace(names, **changed)


def model_names(
    spec: DecoderSpec,
    stems: Mapping[str, str],
    *,
    embedding: str,
    final_norm: str,
    head: str,
    positions: str = "",
    embedding_norm: str = "",
    layouts: Layouts = NO_LAYOUTS,
    permuted_heads: bool = False,
    ignored: tuple[str, ...] = (),
    prefix: str = "",
) -> ModelNames:
    """Names from stems, the names without ".weight" and ".bias"; `stems` is by layer role.

    Which biases there are follows from `spec`.
    """
    biased = {
        "query": spec.attention_bias,
        "key": spec.attention_bias,
        "value": spec.attention_bias,
        "output": spec.output_bias,
        "gate": spec.mlp_bias and spec.gated_mlp,
        "up": spec.mlp_bias,
        "down": spec.mlp_bias,
    }
    weights = {role: f"{stem}.weight" for role, stem in stems.items()}
    biases = {f"{role}_bias": f"{stems[role]}.bias" for role, has in biased.items() if has}
    tied = spec.tie_embeddings
    return ModelNames(
        embedding=f"{embedding}.weight",
        final_norm=f"{final_norm}.weight",
        head=f"{embedding}.weight" if tied else f"{head}.weight",
        head_bias=f"{head}.bias" if spec.head_bias else None,
        positions=f"{positions}.weight",
        embedding_norm=f"{embedding_norm}.weight",
        layers=LayerNames(**weights, **biases),
        layouts=layouts,
        permuted_heads=permuted_heads,
        # tied models are sometimes saved with a copy of the embedding
        ignored=(f"{head}.weight", *ignored) if tied else ignored,
        prefix=prefix,
    )
