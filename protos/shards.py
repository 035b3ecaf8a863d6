"""The cut: which part of every dimension belongs to which rank.

Planner and ranks share these pure functions, so that what is planned is what is loaded. Nothing
has to divide evenly: whole key/value groups, MLP columns and vocabulary rows go to ranks in
balanced contiguous runs, the first ranks taking one unit more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from .errors import ConfigError
from .specs import (
    DTYPE_BYTES,
    ROUNDED_DTYPES,
    SCALE_BYTES,
    DecoderSpec,
    DType,
    LatentSpec,
    StateSpec,
    activation_dtype,
    linear_bytes,
)

MAX_LOGIT_ROWS = 64
"""Rows of logits that exist at a time; a step that needs more computes them in turns."""
MAX_CARRIED = 2
"""Hidden states of micro-batches that a stage has sent and the next one not taken, at most."""
CARRIED_BYTES = 4
"""Of an element of hidden states between stages, at most."""


class Span(NamedTuple):
    """Half-open run [start, stop) of one dimension."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of units in the run."""
        return self.stop - self.start


def cut(total: int, parts: int, index: int) -> Span:
    """Part `index` of `total` units in `parts` runs whose sizes differ by at most one."""
    size, extra = divmod(total, parts)
    start = index * size + min(index, extra)
    return Span(start, start + size + (index < extra))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Stage `index` of `count`: the ranks that hold `layers`, and run them one after another.

    The first one also holds the embedding, the last one the final norm and the head.
    """

    index: int
    count: int
    layers: Span

    @property
    def is_first(self) -> bool:
        """Whether token ids come in here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether tokens are sampled here."""
        return self.index == self.count - 1


def whole(model: DecoderSpec) -> Stage:
    """The only stage of a model that is not cut into several."""
    return Stage(index=0, count=1, layers=Span(0, model.num_layers))


def cut_stages(model: DecoderSpec, pp_size: int) -> tuple[Stage, ...]:
    """`pp_size` stages of consecutive layers, the greatest of which has as few weights as can be.

    A tied embedding counts at both ends. Raises `ConfigError` for more stages than layers.
    """
    if not 1 <= pp_size <= model.num_layers:
        raise ConfigError(
            f"pp_size is {pp_size}, allowed are 1 to {model.num_layers}, the model's layers"
        )
    if pp_size == 1:
        return (whole(model),)
    part = cut_model(model, 1, 0)
    sizes = [_layer_parameters(model, part, layer) for layer in range(model.num_layers)]
    sizes[0] += _first_parameters(model, part)
    sizes[-1] += _last_parameters(model, part)
    return tuple(
        Stage(index=index, count=pp_size, layers=layers)
        for index, layers in enumerate(_balance(sizes, pp_size))
    )


def _balance(sizes: Sequence[int], parts: int) -> list[Span]:
    """Consecutive runs, none empty, with the least greatest sum; of those, the evenest found."""
    ends = [0, *accumulate(sizes)]
    best = {0: (0, 0)}  # end of the runs so far: greatest sum, sum of squares
    starts: list[dict[int, int]] = []
    for part in range(1, parts + 1):
        found: dict[int, tuple[int, int]] = {}
        starts.append({})
        for stop in range(part, len(sizes) - (parts - part) + 1):
            costs = {
                start: (
                    max(most, ends[stop] - ends[start]),
                    squares + (ends[stop] - ends[start]) ** 2,
                )
                for start, (most, squares) in best.items()
                if start < stop
            }
            starts[-1][stop] = min(costs, key=costs.__getitem__)
            found[stop] = costs[starts[-1][stop]]
        best = found
    runs, stop = [], len(sizes)
    for start in reversed(starts):
        runs.append(Span(start[stop], stop))
        stop = start[stop]
    return runs[::-1]


class HeadCut(NamedTuple):
    """A rank's query heads and the key/value heads that they read."""

    query: Span
    kv: Span


def cut_heads(num_heads: int, num_kv_heads: int, parts: int, index: int) -> HeadCut:
    """Query and key/value heads of rank `index`; within a rank every group has equal size.

    Up to `num_kv_heads` ranks, whole groups are dealt out (9 heads in 3 groups on 2 ranks:
    6 + 3). Beyond, ranks are dealt to the key/value heads, each of which is then replicated on
    its ranks, and the query heads of a group are divided among them. A rank left without query
    heads holds no key/value head either.
    """
    if not num_heads:
        return HeadCut(Span(0, 0), Span(0, 0))
    group = num_heads // num_kv_heads
    if parts <= num_kv_heads:
        kv = cut(num_kv_heads, parts, index)
        return HeadCut(Span(kv.start * group, kv.stop * group), kv)
    for head in range(num_kv_heads):
        ranks = cut(parts, num_kv_heads, head)
        if ranks.start <= index < ranks.stop:
            inside = cut(group, ranks.size, index - ranks.start)
            base = head * group
            kv = Span(head, head + 1) if inside.size else Span(head, head)
            return HeadCut(Span(base + inside.start, base + inside.stop), kv)
    raise ValueError(f"rank index {index} is not in [0, {parts})")


class StateCut(NamedTuple):
    """A rank's part of a state space: its units (heads or channels) and what they read."""

    units: Span
    channels: Span
    groups: Span
    """Sets of heads that share b and c, those of neighbours included where they are shared."""


def cut_state(state: StateSpec, parts: int, index: int) -> StateCut:
    """The part of rank `index`: units are dealt out, groups follow from them."""
    units, size = cut(state.units, parts, index), state.unit_size
    each = state.units // state.groups
    groups = Span(units.start // each, -(-units.stop // each)) if units.size else Span(0, 0)
    return StateCut(units, Span(units.start * size, units.stop * size), groups)


def whole_groups(state: StateSpec, parts: int) -> bool:
    """Whether no group's heads are divided among ranks."""
    each = state.units // state.groups
    return all(cut(state.units, parts, index).start % each == 0 for index in range(parts))


class RankCut(NamedTuple):
    """Everything that one rank owns of a model."""

    heads: HeadCut
    mlp: Span
    vocab: Span
    experts: Span = Span(0, 0)
    """Columns of each expert."""
    shared: Span = Span(0, 0)
    """Columns of the shared expert."""
    state: StateCut | None = None


def cut_model(model: DecoderSpec, tp_size: int, rank: int) -> RankCut:
    """The cut of `model` for one rank."""
    return RankCut(
        heads=cut_heads(model.num_heads, model.num_kv_heads, tp_size, rank),
        mlp=cut(model.intermediate_size, tp_size, rank),
        vocab=cut(model.vocab_size, tp_size, rank),
        experts=cut(model.experts.intermediate_size if model.experts else 0, tp_size, rank),
        shared=cut(model.experts.shared_size if model.experts else 0, tp_size, rank),
        state=cut_state(model.state, tp_size, rank) if model.state else None,
    )


def weight_parameters(
    model: DecoderSpec, tp_size: int, rank: int, stage: Stage | None = None
) -> int:
    """Number of weight elements that one rank of a stage holds; by default, of the only stage."""
    part, stage = cut_model(model, tp_size, rank), stage or whole(model)
    total = sum(_layer_parameters(model, part, layer) for layer in range(*stage.layers))
    total += _first_parameters(model, part) * stage.is_first
    total += _last_parameters(model, part) * stage.is_last
    if model.tie_embeddings and stage.is_first and stage.is_last:
        total -= model.hidden_size * part.vocab.size
    return total


def weight_bytes(
    model: DecoderSpec, tp_size: int, rank: int, dtype: DType, stage: Stage | None = None
) -> int:
    """Bytes of the weights that one rank of a stage holds; attention sinks, what corrects a choice
    of experts, and the numbers that a state space's states decay by, are float32.

    Rounded linear layers take `linear_bytes`. In int8 the head is rounded too, and a table that is
    both embedding and head is held twice, once in each format.
    """
    size, stage = DTYPE_BYTES[activation_dtype(dtype)], stage or whole(model)
    experts, part = model.experts, cut_model(model, tp_size, rank)
    wide = model.attention_sinks * part.heads.query.size * stage.layers.size
    if experts is not None and experts.corrected:
        held = sum(model.has_experts(layer) for layer in range(*stage.layers))
        wide += experts.num_experts * held
    if model.state is not None:
        wide += _decay_parameters(model.state, tp_size, rank) * state_layers(model, stage)
    total = size * weight_parameters(model, tp_size, rank, stage) + (4 - size) * wide
    if dtype not in ROUNDED_DTYPES:
        return total
    head = (part.vocab.size, model.hidden_size)
    shapes = [head] if stage.is_last and dtype == "int8" else []
    if shapes and model.tie_embeddings and stage.is_first:
        total += size * head[0] * head[1]
    for layer in range(*stage.layers):
        shapes += linear_shapes(model, part, layer)
    return total + sum(linear_bytes(dtype, *shape) - size * shape[0] * shape[1] for shape in shapes)


def _first_parameters(model: DecoderSpec, part: RankCut) -> int:
    """What comes before the layers."""
    hidden = model.hidden_size
    positions = (model.max_context + model.position_offset) * hidden * model.learned_positions
    norm = model.embedding_norm * _norm_parameters(model)
    return hidden * part.vocab.size + positions + norm


def _last_parameters(model: DecoderSpec, part: RankCut) -> int:
    """What comes after the layers."""
    return (model.hidden_size + model.head_bias) * part.vocab.size + _norm_parameters(model)


def linear_shapes(model: DecoderSpec, part: RankCut, layer: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's projections, the routers of experts left out."""
    hidden, dim = model.hidden_size, model.head_dim
    heads, latent = part.heads.query.size, model.latent
    if latent is None:
        kv = part.heads.kv.size
        shapes = [((heads + 2 * kv) * dim, hidden), (hidden, heads * dim)]
    else:
        small = latent.kv_rank + model.rotary_dim
        shapes = [((latent.query_rank or heads * dim) + small, hidden)]
        shapes += [(heads * dim, latent.query_rank)] if latent.query_rank else []
        shapes.append((heads * (dim - model.rotary_dim + latent.value_dim), latent.kv_rank))
        shapes.append((hidden, heads * latent.value_dim))
    if model.experts is None or not model.has_experts(layer):
        columns = part.mlp.size
        return [*shapes, ((1 + model.gated_mlp) * columns, hidden), (hidden, columns)]
    widths = [part.experts.size] * model.experts.num_experts
    widths += [part.shared.size] if model.experts.shared_size else []
    return shapes + [pair for n in widths for pair in ((2 * n, hidden), (hidden, n))]


def _norm_parameters(model: DecoderSpec) -> int:
    return model.hidden_size * (model.norm_affine + model.norm_bias)


def _attention_parameters(model: DecoderSpec, part: RankCut) -> int:
    hidden, dim = model.hidden_size, model.head_dim
    query, kv = part.heads.query.size * dim, part.heads.kv.size * dim
    total = hidden * (query + 2 * kv) + query * hidden
    total += model.attention_bias * (query + 2 * kv) + model.output_bias * hidden
    total += model.attention_sinks * part.heads.query.size
    if model.qk_norm != "none":
        total += 2 * dim if model.qk_norm == "head" else query + kv
    return total


def _latent_parameters(model: DecoderSpec, latent: LatentSpec, heads: int) -> int:
    hidden, dim, rotated = model.hidden_size, model.head_dim, model.rotary_dim
    rank = latent.query_rank
    total = rank * (hidden + 1) + heads * dim * (rank or hidden)
    total += latent.kv_rank * (hidden + 1) + rotated * hidden
    total += heads * (dim - rotated + latent.value_dim) * latent.kv_rank
    return total + heads * latent.value_dim * hidden


def _decay_parameters(state: StateSpec, tp_size: int, rank: int) -> int:
    """a, skip and the steps' bias of each unit."""
    return cut_state(state, tp_size, rank).units.size * (
        2 + (1 if state.heads else state.state_size)
    )


def convolved_channels(state: StateSpec, part: StateCut) -> int:
    """A rank's channels that go through the convolution; with heads, b and c do as well."""
    shared = 2 * part.groups.size * state.state_size if state.heads else 0
    return part.channels.size + shared


def _state_parameters(model: DecoderSpec, state: StateSpec, part: StateCut) -> int:
    hidden, inner, units = model.hidden_size, part.channels.size, part.units.size
    convolved = convolved_channels(state, part)
    total = convolved * (state.conv_width + state.conv_bias)
    if state.heads:
        rows = inner + convolved + units
        total += inner + units * 3  # norm; a, skip, bias of steps
    else:
        rows = 2 * inner
        total += (state.step_rank + 2 * state.state_size) * inner
        total += inner * (state.step_rank + state.state_size + 2)
    return total + rows * (hidden + state.bias) + hidden * (inner + state.bias)


_BLOCK_NORMS = {"pre": 2, "sandwich": 4, "post": 2, "parallel": 1, "parallel_two": 2, "single": 1}


def _layer_parameters(model: DecoderSpec, part: RankCut, layer: int) -> int:
    hidden = model.hidden_size
    if model.state is not None and part.state is not None and model.has_state(layer):
        total = _state_parameters(model, model.state, part.state)
    elif model.latent is None:
        total = _attention_parameters(model, part)
    else:
        total = _latent_parameters(model, model.latent, part.heads.query.size)
    total += _BLOCK_NORMS[model.block] * _norm_parameters(model)
    if model.block == "single":
        return total
    if model.experts is not None and model.has_experts(layer):
        experts = model.experts
        shared = 0
        if experts.shared_size:
            shared = hidden * (experts.shared_gated + 3 * part.shared.size)
        shared += experts.num_experts * experts.corrected
        biases = 1 + 2 * part.experts.size + hidden
        shared += experts.num_experts * biases * experts.biased
        return total + experts.num_experts * hidden * (1 + 3 * part.experts.size) + shared
    projections = 1 + model.gated_mlp
    total += (projections + 1) * hidden * part.mlp.size
    return total + model.mlp_bias * (projections * part.mlp.size + hidden)


def kv_bytes_per_token(
    model: DecoderSpec, tp_size: int, rank: int, dtype: DType, stage: Stage | None = None
) -> int:
    """Bytes that one token takes in the KV pool of one rank of a stage."""
    kv = cut_heads(model.num_heads, model.num_kv_heads, tp_size, rank).kv.size
    stage = stage or whole(model)
    layers = stage.layers.size - state_layers(model, stage)
    row = model.head_dim * DTYPE_BYTES[dtype] + SCALE_BYTES * (dtype == "int8")
    return 2 * layers * kv * row


def state_layers(model: DecoderSpec, stage: Stage) -> int:
    """Layers of a stage that have states in place of keys and values."""
    return sum(model.has_state(layer) for layer in range(*stage.layers))


def state_bytes_per_slot(
    model: DecoderSpec, tp_size: int, rank: int, dtype: str, stage: Stage | None = None
) -> int:
    """Bytes that a sequence's states take on one rank of a stage: float32, and `dtype` what is
    convolved."""
    state = model.state
    if state is None:
        return 0
    part = cut_state(state, tp_size, rank)
    window = (state.conv_width - 1) * convolved_channels(state, part) * DTYPE_BYTES[dtype]
    each = 4 * part.channels.size * state.state_size + window
    return state_layers(model, stage or whole(model)) * each
