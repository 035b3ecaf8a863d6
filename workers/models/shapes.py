"""The shape of every tensor that a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.protos.specs import DecoderSpec, LatentSpec, StateSpec

from .layout import PLAIN, Layouts
from .naming import LayerNames, ModelNames

Shapes = dict[str, tuple[int, ...]]
Part = tuple[str, str, str | None, int, int]
"""Role, weight, bias, rows and columns of a projection."""


def shapes(spec: DecoderSpec, names: ModelNames) -> Shapes:
    """Row-major shapes by name; of a fused tensor, the whole."""
    hidden = spec.hidden_size
    found: Shapes = {
        names.embedding: (spec.vocab_size, hidden),
        names.head: (spec.vocab_size, hidden),
    }
    if names.head_bias is not None:
        found[names.head_bias] = (spec.vocab_size,)
    if spec.learned_positions:
        found[names.positions] = (spec.max_context + spec.position_offset, hidden)
    norms = [names.final_norm, *([names.embedding_norm] if spec.embedding_norm else [])]
    for index in range(spec.num_layers):
        layer = names.layer(index)
        norms += norm_names(spec, layer)
        found |= _projections(spec, layer, index, names.layouts)
        if spec.state is not None and spec.has_state(index):
            found |= _state_vectors(spec.state, layer)
            continue
        found |= dict(_head_norms(spec, layer, names.layouts))
        if spec.attention_sinks:
            found[layer.sinks] = (spec.num_heads,)
    for name in norms:
        if spec.norm_affine:
            found[name] = (hidden,)
        if spec.norm_bias:
            found[bias_name(name)] = (hidden,)
    return found


def bias_name(weight: str) -> str:
    """The name of the bias beside a norm's weight."""
    return weight.removesuffix("weight") + "bias"


def norm_names(spec: DecoderSpec, layer: LayerNames) -> list[str]:
    """The names of a layer's norms over the hidden states, in the order of their use."""
    return {
        "pre": [layer.input_norm, layer.post_norm],
        "sandwich": [layer.input_norm, layer.attention_norm, layer.post_norm, layer.mlp_norm],
        "post": [layer.attention_norm, layer.mlp_norm],
        "parallel": [layer.input_norm],
        "parallel_two": [layer.input_norm, layer.post_norm],
        "single": [layer.input_norm],
    }[spec.block]


def _attention(spec: DecoderSpec, layer: LayerNames) -> list[Part]:
    hidden = spec.hidden_size
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return [
        ("query", layer.query, layer.query_bias, query, hidden),
        ("key", layer.key, layer.key_bias, kv, hidden),
        ("value", layer.value, layer.value_bias, kv, hidden),
        ("output", layer.output, layer.output_bias, hidden, query),
    ]


def _latent(spec: DecoderSpec, latent: LatentSpec, layer: LayerNames) -> list[Part]:
    hidden, heads, rotated = spec.hidden_size, spec.num_heads, spec.rotary_dim
    plain, rank, kv_rank = spec.head_dim - rotated, latent.query_rank, latent.kv_rank
    value = heads * latent.value_dim
    first: list[Part] = [("query_latent", layer.query_latent, None, rank, hidden)] if rank else []
    return [
        *first,
        ("query", layer.query, None, heads * plain, rank or hidden),
        ("query_rotated", layer.query_rotated, None, heads * rotated, rank or hidden),
        ("key_latent", layer.key_latent, None, kv_rank, hidden),
        ("key_rotated", layer.key_rotated, None, rotated, hidden),
        ("key", layer.key, None, heads * plain, kv_rank),
        ("value", layer.value, None, value, kv_rank),
        ("output", layer.output, None, hidden, value),
    ]


def _state(spec: DecoderSpec, state: StateSpec, layer: LayerNames) -> list[Part]:
    hidden, inner, size = spec.hidden_size, state.inner_size, state.state_size
    bias = layer.state_bias
    parts: list[Part] = [
        ("state_gate", layer.state_gate, bias, inner, hidden),
        ("state_x", layer.state_x, bias, inner, hidden),
        ("conv_x", layer.conv_x, layer.conv_bias, inner, state.conv_width),
    ]
    if state.heads:
        shared, width = state.groups * size, state.conv_width
        parts += [
            ("state_b", layer.state_b, bias, shared, hidden),
            ("state_c", layer.state_c, bias, shared, hidden),
            ("state_steps", layer.state_steps, bias, state.heads, hidden),
            ("conv_b", layer.conv_b, layer.conv_bias, shared, width),
            ("conv_c", layer.conv_c, layer.conv_bias, shared, width),
        ]
    else:
        small = state.step_rank + 2 * size
        parts += [
            ("state_select", layer.state_select, None, small, inner),
            ("step_weight", layer.step_weight, layer.step_bias, inner, state.step_rank),
        ]
    return [*parts, ("output", layer.output, layer.output_bias, hidden, inner)]


def _state_vectors(state: StateSpec, layer: LayerNames) -> Shapes:
    """The tensors of a state space that are not projections."""
    found: Shapes = {layer.state_skip: (state.units,)}
    if not state.heads:
        return found | {layer.state_decay: (state.inner_size, state.state_size)}
    found |= dict.fromkeys((layer.step_bias, layer.state_decay), (state.heads,))
    return found | {layer.state_norm: (state.inner_size,)}


def _projections(spec: DecoderSpec, layer: LayerNames, index: int, layouts: Layouts) -> Shapes:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    if spec.state is not None and spec.has_state(index):
        parts = _state(spec, spec.state, layer)
    else:
        latent = spec.latent
        parts = _attention(spec, layer) if latent is None else _latent(spec, latent, layer)
    if spec.has_experts(index):
        parts += _experts(spec, layer, layouts)
    elif spec.block != "single":
        if spec.gated_mlp:
            parts.append(("gate", layer.gate, layer.gate_bias, inner, hidden))
        parts.append(("up", layer.up, layer.up_bias, inner, hidden))
        parts.append(("down", layer.down, layer.down_bias, hidden, inner))
    found: Shapes = {}
    for role, weight, bias, rows, columns in parts:
        transposed = layouts.get(role, PLAIN).transposed
        rows += found.get(weight, (0, 0))[1 if transposed else 0]  # fused: one after the other
        found[weight] = (columns, rows) if transposed else (rows, columns)
        if bias is not None:
            found[bias] = (rows,)
    count = spec.experts.num_experts if spec.experts else 1
    for name in _stacked(parts, layouts):
        found[name] = (count, *found[name])
    if spec.experts is not None and spec.experts.corrected and spec.has_experts(index):
        found[layer.router_correction] = (spec.experts.num_experts,)
    return found


def _stacked(parts: list[Part], layouts: Layouts) -> set[str]:
    """The tensors that hold one projection of every expert."""
    stacked = [part for part in parts if layouts.get(part[0], PLAIN).entry is not None]
    return {name for part in stacked for name in part[1:3] if name is not None}


def _experts(spec: DecoderSpec, layer: LayerNames, layouts: Layouts) -> list[Part]:
    if spec.experts is None:
        return []
    hidden, inner = spec.hidden_size, spec.experts.intermediate_size
    count, router = spec.experts.num_experts, layer.router
    parts: list[Part] = [("router", router, layer.router_bias, count, hidden)]
    each: list[Part] = [
        ("expert_gate", layer.expert_gate, layer.expert_gate_bias, inner, hidden),
        ("expert_up", layer.expert_up, layer.expert_up_bias, inner, hidden),
        ("expert_down", layer.expert_down, layer.expert_down_bias, hidden, inner),
    ]
    if layouts.get("expert_down", PLAIN).entry is not None:
        parts += each
    else:
        for expert in map(str, range(count)):
            for role, name, _, rows, columns in each:
                parts.append((role, name.replace("{expert}", expert), None, rows, columns))
    if shared := spec.experts.shared_size:
        if spec.experts.shared_gated:
            parts.append(("shared_router", layer.shared_router, None, 1, hidden))
        parts.append(("shared_gate", layer.shared_gate, None, shared, hidden))
        parts.append(("shared_up", layer.shared_up, None, shared, hidden))
        parts.append(("shared_down", layer.shared_down, None, hidden, shared))
    return parts


def _head_norms(
    spec: DecoderSpec, layer: LayerNames, layouts: Layouts
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if spec.latent is not None:
        if spec.latent.query_rank:
            yield layer.query_norm, (spec.latent.query_rank,)
        yield layer.key_norm, (spec.latent.kv_rank,)
    if spec.qk_norm == "none":
        return
    for name, heads in ((layer.query_norm, spec.num_heads), (layer.key_norm, spec.num_kv_heads)):
        if spec.qk_norm == "width":
            yield name, (heads * spec.head_dim,)
        elif spec.qk_norm == "head":
            yield name, (spec.head_dim,)
        elif layouts.get("query_norm", PLAIN).heads_as_rows:
            yield name, (heads, spec.head_dim)
        else:
            for head in range(heads):
                yield name.replace("{head}", str(head)), (spec.head_dim,)
