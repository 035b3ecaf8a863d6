"""The memory plan of one replica: what each rank holds, and how many KV blocks fit.

Pure arithmetic on sizes; weights and KV are exact, activations an upper estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from phalanx.protos.errors import ConfigError
from phalanx.protos.shards import (
    CARRIED_BYTES,
    MAX_CARRIED,
    MAX_LOGIT_ROWS,
    RankCut,
    Stage,
    convolved_channels,
    cut_model,
    cut_stages,
    cut_state,
    kv_bytes_per_token,
    linear_shapes,
    state_bytes_per_slot,
    weight_bytes,
    whole,
)
from phalanx.protos.specs import (
    DTYPE_BYTES,
    ROUNDED_DTYPES,
    CacheSpec,
    DecoderSpec,
    DType,
    StateSpec,
    activation_dtype,
)

HIDDEN_COPIES = 4  # block input and its residual, both once more after the norm
INNER_COPIES = 4  # gate and up, the activated gate, the product
ROUNDED_PARTS = (13, 8)  # of a block in bfloat16: products in float32, inputs as they are rounded
QUERY_COPIES, KV_COPIES = 4, 5  # fused projection, rotated copy, gathered pages, outputs
INDEX_BYTES = 16  # token id and slot
LOGIT_COPIES = 3  # in float32: raw, adjusted, and those of the rows that share a way of sampling
PIECE_BYTES = 24  # of a logit while its random number is made
PIECE_LOGITS = 1 << 18  # that this is done for at a time, at least one row
SCORE_BYTES = 12  # of a score that is capped or biased, while it is made a weight
PIECE_SCORES = 1 << 20  # that this is done for at a time
FREE_TOKENS = 1 << 20  # of blocks that take no memory
CONVOLVED_COPIES = 6  # as projected, window, two sums, activated, result
STEP_COPIES = 5  # of states that advance by a token: as read, decay, what is added, sum, product
STEPPED = 1 << 21  # states that do so at a time, at least one row's
SCANNED = 1 << 17  # states that are worked out at a time
SCANNED_COPIES = 2  # decay, what is added
RUN = 64  # tokens that are scanned at a time by products


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """One rank's memory in bytes; `kv_tokens` is the size of its pool in tokens, `state_slots`
    that of its pool of states. Ranks are counted through all stages."""

    rank: int
    weights: int
    rope_table: int
    activations: int
    kv_per_token: int
    kv_tokens: int
    available: int | None = None
    state_slot: int = 0
    """Bytes of the states of one sequence or prefix."""
    state_slots: int = 0

    @property
    def states(self) -> int:
        """Bytes of the state pool."""
        return self.state_slot * self.state_slots

    @property
    def kv(self) -> int:
        """Bytes of the KV pool."""
        return self.kv_per_token * self.kv_tokens

    @property
    def fixed(self) -> int:
        """Bytes that are needed before the first token is cached."""
        return self.weights + self.rope_table + self.activations + self.states

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.fixed + self.kv


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What every rank of a replica holds; the number of KV blocks is the same on each."""

    ranks: tuple[RankMemory, ...]
    dtype: DType
    """Of weights and activations."""
    cache: CacheSpec
    stages: tuple[Stage, ...]
    """Each has the same number of `ranks`."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.cache.num_blocks * self.cache.block_size


def activation_bytes(
    model: DecoderSpec,
    *,
    dtype: DType,
    tp_size: int,
    rank: int,
    max_tokens_per_step: int,
    max_running: int,
    stage: Stage | None = None,
) -> int:
    """Peak of a step's temporaries on one rank, in bytes: an estimate from above.

    With T tokens a step, b bytes an element, q, kv, m and v the rank's query, key/value, MLP and
    vocabulary columns, r the rotated dimensions, and R = min(max_running, 64) rows of logits, it
    is the largest of

        T (4 hidden b + r b + 16 + max(4 q + 5 kv, 4 m) b)                 the layers
        R v (3 * 4 + (b if b < 4 else 0)) + 24 min(R v, max(v, 2**18))     sampling
        S v (4 + (b if b < 4 else 0)) + 24 min(S v, max(v, 2**18))         scoring a prompt

    with S = min(T, 64). The first is hidden states, angles and indices, with the larger of the two
    blocks; the others are the logits as the head gives them, their float32 copies, and what is
    worked out in pieces. Blocks that keep their input need one hidden state more, a sliding window
    a mask of T^2 bytes, rounded weights 13 / 8 of the blocks' bytes in bfloat16, those of int4 the
    largest of them unpacked, latent attention its small
    vectors, and scores that are capped or biased 12 bytes each, a piece at a time. Of the pages
    that attention gathers, no more are counted than the step has tokens. Of several stages, each
    has 4 T hidden bytes for what it takes and for each of what it has sent, and only the last one
    has logits.
    """
    stage = stage or whole(model)
    part, size = cut_model(model, tp_size, rank), DTYPE_BYTES[activation_dtype(dtype)]
    query = part.heads.query.size * model.head_dim
    kv = part.heads.kv.size * model.head_dim
    attention = QUERY_COPIES * query + KV_COPIES * kv
    if model.latent is not None:
        attention += model.latent.query_rank + 2 * model.latent.kv_rank + model.rotary_dim
    block = max(attention, INNER_COPIES * part.mlp.size)
    if dtype in ROUNDED_DTYPES:
        block = block * ROUNDED_PARTS[0] // ROUNDED_PARTS[1]
    block += model.hidden_size * (model.block in ("parallel", "parallel_two", "post", "single"))
    angles = sum(rope.rotary_dim for rope in (model.rope, model.local_rope) if rope)
    elements = HIDDEN_COPIES * model.hidden_size + angles + block
    layers = max_tokens_per_step * (elements * size + INDEX_BYTES)
    layers += max_tokens_per_step**2 * any(model.windows)
    layers += size * _largest_linear(model, part, stage) * (dtype == "int4")
    if model.attention_softcap or model.alibi_slopes:
        scores = part.heads.query.size * max_tokens_per_step**2
        layers += SCORE_BYTES * min(scores, PIECE_SCORES)
    if model.state is not None:
        layers += _state_bytes(
            model, model.state, size, tp_size, rank, max_tokens_per_step, max_running
        )
    if stage.count > 1:
        layers += (1 + MAX_CARRIED) * max_tokens_per_step * model.hidden_size * CARRIED_BYTES
    if not stage.is_last:
        return layers
    sampling = _logit_bytes(part.vocab.size, min(max_running, MAX_LOGIT_ROWS), size, LOGIT_COPIES)
    scoring = _logit_bytes(part.vocab.size, min(max_tokens_per_step, MAX_LOGIT_ROWS), size, 1)
    return max(layers, sampling, scoring)


def _largest_linear(model: DecoderSpec, part: RankCut, stage: Stage) -> int:
    """Weights of the largest projection."""
    layers = range(*stage.layers)
    return max(a * b for layer in layers for a, b in linear_shapes(model, part, layer))


def _state_bytes(
    model: DecoderSpec,
    state: StateSpec,
    size: int,
    tp_size: int,
    rank: int,
    tokens: int,
    rows: int,
) -> int:
    """What a layer with a state space works with: channels, and the states of all rows.

    The largest of what is there while channels are convolved, while many tokens are scanned, and
    while each row advances by one.
    """
    part = cut_state(state, tp_size, rank)
    convolved, inner = convolved_channels(state, part), part.channels.size
    states = inner * state.state_size
    convolving = tokens * (inner + CONVOLVED_COPIES * convolved) * size
    widened = convolved if size < 4 else 0
    if state.heads:
        copied = part.groups.size > 1  # b, c and what they give, for each head
        run = RUN * ((2 + copied) * RUN + 2 * copied * state.state_size + 3 * state.unit_size)
        run *= part.units.size
        widened += inner
    else:
        run = SCANNED_COPIES * min(tokens * states, max(states, SCANNED))
        widened += 2 * inner
    scanning = tokens * ((inner + 2 * convolved) * size + 4 * widened)
    scanning += 4 * (run + states)
    stepping = STEP_COPIES * min(min(rows, tokens) * states, max(states, STEPPED))
    return max(convolving, scanning, 4 * stepping)


def _logit_bytes(columns: int, rows: int, size: int, copies: int) -> int:
    """Logits of `size` bytes, float32 copies of them, and the work on a piece of them."""
    piece = min(rows * columns, max(columns, PIECE_LOGITS))
    return rows * columns * (copies * 4 + (size if size < 4 else 0)) + PIECE_BYTES * piece


def plan_memory(
    model: DecoderSpec,
    *,
    dtype: DType,
    kv_dtype: DType,
    tp_size: int,
    block_size: int,
    max_tokens_per_step: int,
    max_running: int,
    memory_per_rank: Sequence[int] | None,
    kv_tokens: int | None,
    min_kv_tokens: int = 1,
    pp_size: int = 1,
    state_slots: int | None = None,
) -> MemoryPlan:
    """Divide `memory_per_rank` (bytes, one entry a rank) into weights, temporaries and KV blocks.

    Ranks are those of the first stage, then those of the second one, and so on.
    `kv_tokens` asks for a pool of so many tokens, rounded up to blocks; None fills the memory.
    Without `memory_per_rank` nothing can be compared, and `kv_tokens` must be given. A pool of
    fewer than `min_kv_tokens` is refused. `state_slots` asks for so many slots for states; None
    takes two for each sequence that may run, or as many as fit beside the least KV pool. Where
    blocks take no memory, as in a model of states alone, they are for `FREE_TOKENS` or more. Raises
    `ConfigError` naming the rank, the bytes and what would help.
    """
    _check(
        model,
        tp_size=tp_size,
        pp_size=pp_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        memory_per_rank=memory_per_rank,
        sizes={
            "block_size": block_size,
            "max_tokens_per_step": max_tokens_per_step,
            "max_running": max_running,
            "kv_tokens": kv_tokens,
            "min_kv_tokens": min_kv_tokens,
            "state_slots": state_slots,
        },
    )
    stages = cut_stages(model, pp_size)
    given = (dtype, kv_dtype, tp_size, max_tokens_per_step, max_running, memory_per_rank)
    places = product(stages, range(tp_size))
    ranks = [_empty(model, stage, place, *given) for stage, place in places]
    wanted = -(-(kv_tokens or min_kv_tokens) // block_size)
    slots = state_slots or _slots(ranks, 2 * max_running, wanted * block_size)
    ranks = [replace(memory, state_slots=slots) for memory in ranks]
    more = [f"a pp_size above {pp_size}"] if pp_size < model.num_layers else []
    for memory in ranks:
        advice = [f"a tp_size above {tp_size}", *more]
        _check_fits(memory, wanted * block_size, dtype, advice)
    blocks = wanted if kv_tokens else _fitting(ranks, block_size, wanted)
    return MemoryPlan(
        ranks=tuple(replace(memory, kv_tokens=blocks * block_size) for memory in ranks),
        dtype=dtype,
        cache=CacheSpec(block_size=block_size, num_blocks=blocks, dtype=kv_dtype, num_states=slots),
        stages=stages,
    )


def _empty(
    model: DecoderSpec,
    stage: Stage,
    place: int,
    dtype: DType,
    kv_dtype: DType,
    tp_size: int,
    max_tokens_per_step: int,
    max_running: int,
    memory_per_rank: Sequence[int] | None,
) -> RankMemory:
    """What the rank in `place` of a stage holds before there is a cache."""
    rank = stage.index * tp_size + place
    return RankMemory(
        rank=rank,
        available=None if memory_per_rank is None else memory_per_rank[rank],
        weights=weight_bytes(model, tp_size, place, dtype, stage),
        # cos and sin of half the rotated dimensions, in the model's dtype
        rope_table=model.max_context
        * sum(rope.rotary_dim for rope in (model.rope, model.local_rope) if rope)
        * DTYPE_BYTES[activation_dtype(dtype)],
        activations=activation_bytes(
            model,
            dtype=dtype,
            tp_size=tp_size,
            rank=place,
            max_tokens_per_step=max_tokens_per_step,
            max_running=max_running,
            stage=stage,
        ),
        kv_per_token=kv_bytes_per_token(model, tp_size, place, kv_dtype, stage),
        kv_tokens=0,
        state_slot=state_bytes_per_slot(model, tp_size, place, dtype, stage),
    )


def _check(
    model: DecoderSpec,
    *,
    tp_size: int,
    pp_size: int,
    dtype: str,
    kv_dtype: str,
    memory_per_rank: Sequence[int] | None,
    sizes: dict[str, int | None],
) -> None:
    if not 1 <= tp_size <= model.max_ranks:
        what = "attention heads" if model.attention_layers else "heads or channels"
        raise ConfigError(
            f"tp_size is {tp_size}, allowed are 1 to {model.max_ranks}, the model's {what}"
        )
    known = {"dtype": (dtype, get_args(DType)), "kv_dtype": (kv_dtype, tuple(DTYPE_BYTES))}
    for name, (value, allowed) in known.items():
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} is {size}, at least 1 is needed")
    if model.state is not None and dtype in ROUNDED_DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, which models with state spaces do not have")
    if sizes["state_slots"] is not None and model.state is None:
        raise ConfigError(f"state_slots is {sizes['state_slots']}, the model has no state spaces")
    asked, least = sizes["kv_tokens"], sizes["min_kv_tokens"]
    if asked is not None and least is not None and asked < least:
        raise ConfigError(f"kv_tokens is {asked}, at least {least} are needed")
    if memory_per_rank is None and asked is None:
        raise ConfigError("kv_tokens is needed where memory_per_rank is not given")
    ranks = pp_size * tp_size
    if memory_per_rank is not None and len(memory_per_rank) != ranks:
        raise ConfigError(
            f"memory_per_rank has {len(memory_per_rank)} entries, {ranks} ranks need as many"
        )


def _check_fits(memory: RankMemory, kv_tokens: int, dtype: DType, advice: list[str]) -> None:
    """Refuse a rank whose memory cannot hold its weights, temporaries and `kv_tokens`."""
    needed = memory.fixed + memory.kv_per_token * kv_tokens
    if memory.available is None or needed <= memory.available:
        return
    advice = [*advice, *(["a 2-byte dtype"] if DTYPE_BYTES[activation_dtype(dtype)] > 2 else [])]
    advice.append("fewer max_tokens_per_step")
    if memory.state_slots > 1:
        advice.append("fewer state_slots")
    if memory.fixed < memory.available and memory.kv_per_token:
        advice.append(
            f"kv_tokens of at most {(memory.available - memory.fixed) // memory.kv_per_token}"
        )
    states = f"{memory.state_slots} states {memory.states}, " if memory.state_slots else ""
    raise ConfigError(
        f"rank {memory.rank} needs {needed} bytes (weights {memory.weights}, rope table "
        f"{memory.rope_table}, activations {memory.activations}, {states}KV cache of {kv_tokens} tokens "
        f"{needed - memory.fixed}) and has {memory.available}; would help: {', '.join(advice)}"
    )


def _blocks(memory: RankMemory, block_size: int) -> int | None:
    """KV blocks that fit on a rank; None without a bound."""
    if memory.available is None or memory.kv_per_token == 0:
        return None
    return (memory.available - memory.fixed) // (memory.kv_per_token * block_size)


def _fitting(ranks: Sequence[RankMemory], block_size: int, least: int) -> int:
    """KV blocks that fit on every rank; where they take no memory, `least` or `FREE_TOKENS`."""
    free = max(least, FREE_TOKENS // block_size)
    return min(filter(None, (_blocks(memory, block_size) for memory in ranks)), default=free)


def _slots(ranks: Sequence[RankMemory], most: int, kv_tokens: int) -> int:
    """Slots for states that fit on every rank beside `kv_tokens`: at most `most`, at least 1, none
    for a model without states."""
    if not any(memory.state_slot for memory in ranks):
        return 0
    fitting = [
        (memory.available - memory.fixed - memory.kv_per_token * kv_tokens) // memory.state_slot
        for memory in ranks
        if memory.available is not None and memory.state_slot
    ]
    return max(min([most, *fitting]), 1)
