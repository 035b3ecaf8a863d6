"""A step plan as tensors, and the sequences that the rank keeps between plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from phalanx.kernels.interface import AttentionPlan, KernelBackend, SequenceSpan
from phalanx.protos.errors import GroupLost
from phalanx.protos.grammars import GrammarState
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import NewSequence, Row

from .layers.rope import RotaryTable
from .states import StateRows
from .transfer import upload

UNKNOWN = -1
"""Stands for a token that the device has chosen and the host has not read yet."""


@dataclass(slots=True)
class SequenceState:
    """What a rank knows of a sequence; grows by the rank's own sampled tokens."""

    seq: int
    token_ids: list[int]
    num_prompt: int
    num_computed: int
    params: SamplingParams
    sample_index: int
    blocks: list[int] = field(default_factory=list)
    grammar: GrammarState | None = None
    """Where its output stands in the grammar, once that was asked for."""

    @classmethod
    def of(cls, new: NewSequence) -> SequenceState:
        """The state of a sequence seen for the first time."""
        return cls(
            seq=new.seq,
            token_ids=list(new.token_ids),
            num_prompt=new.num_prompt,
            num_computed=new.num_computed,
            params=new.params,
            sample_index=new.sample_index,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one forward pass over T tokens, shared by all layers."""

    token_ids: Tensor  # int64 [T]
    slots: Tensor  # int64 [T], where each token's key and value go
    cos: Tensor  # [T, rotary_dim / 2]
    sin: Tensor  # [T, rotary_dim / 2]
    attention: AttentionPlan
    logit_rows: Tensor  # int64: rows whose logits are wanted
    sampled: list[SequenceState]
    """Sequences that sample, in batch order; their logits are the first `len(sampled)` rows."""
    scored: list[tuple[SequenceState, int, int]]
    """(sequence, first position, rows) of prompt positions whose next token is scored."""
    fed: list[tuple[int, SequenceState]] = field(default_factory=list)
    """(row, sequence) of tokens that only the device knows; `token_ids` holds 0 there."""
    positions: Tensor | None = None  # int64 [T]
    local: tuple[Tensor, Tensor] | None = None
    """cos, sin of the layers that rotate at another pace."""
    states: StateRows | None = None
    """Where the layers that have states find them."""


class BatchBuilder:
    """Turns the rows of a plan into a `Batch`, advancing the sequences' `num_computed`."""

    def __init__(
        self,
        rotary: RotaryTable | None,
        backend: KernelBackend,
        block_size: int,
        device: torch.device,
        local: RotaryTable | None = None,
        *,
        has_states: bool = False,
    ) -> None:
        self._rotary, self._local, self._backend = rotary, local, backend
        self._block_size, self._device = block_size, device
        self._has_states = has_states

    def advance(
        self, rows: Sequence[Row], sequences: dict[int, SequenceState]
    ) -> list[SequenceState]:
        """The states of `rows` as they are once these are computed. Raises `GroupLost` if the
        plan does not fit what the rank knows."""
        return [self._advance(row, sequences) for row in rows]

    def build(self, rows: Sequence[Row], states: Sequence[SequenceState]) -> Batch:
        """Tensors for `rows`, whose `states` are already advanced."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[SequenceSpan] = []
        sampled: list[SequenceState] = []
        sampled_rows: list[int] = []
        scored: list[tuple[SequenceState, int, int]] = []
        scored_rows: list[int] = []
        fed: list[tuple[int, SequenceState]] = []
        for row, state in zip(rows, states, strict=True):
            first, last = state.num_computed - row.num_new, state.num_computed
            start, size = len(tokens), self._block_size
            tokens += state.token_ids[first:last]
            if row.num_new == 1:  # arrays of one number cost more than the number
                positions.append(first)
                slots.append(state.blocks[first // size] * size + first % size)
            else:
                position = np.arange(first, last)
                positions += position.tolist()
                slots += (
                    np.asarray(state.blocks)[position // size] * size + position % size
                ).tolist()
            spans.append(SequenceSpan(start, row.num_new, last, state.blocks))
            if tokens[-1] == UNKNOWN:
                fed.append((len(tokens) - 1, state))
                tokens[-1] = 0
            if last == len(state.token_ids):
                sampled.append(state)
                sampled_rows.append(len(tokens) - 1)
            if state.params.prompt_logprobs is not None and first < state.num_prompt - 1:
                count = min(last, state.num_prompt - 1) - first
                scored.append((state, first, count))
                scored_rows += range(start, start + count)
        position_tensor = self._tensor(np.asarray(positions))
        none = position_tensor[:0]
        cos, sin = self._rotary.at(position_tensor) if self._rotary else (none, none)
        return Batch(
            token_ids=self._tensor(np.asarray(tokens)),
            slots=self._tensor(np.asarray(slots)),
            cos=cos,
            sin=sin,
            attention=self._backend.plan_attention(spans, self._block_size),
            logit_rows=self._tensor(np.asarray(sampled_rows + scored_rows, dtype=np.int64)),
            sampled=sampled,
            scored=scored,
            fed=fed,
            positions=position_tensor,
            local=self._local.at(position_tensor) if self._local else None,
            states=StateRows.of(rows, self._device) if self._has_states else None,
        )

    def of_tensors(
        self, token_ids: Tensor, positions: Tensor, slots: Tensor, plan: AttentionPlan, rows: Tensor
    ) -> Batch:
        """A decode step whose values stand in device memory; all int64 [B], all rows sample."""
        none = positions[:0]
        cos, sin = self._rotary.at(positions) if self._rotary else (none, none)
        return Batch(
            token_ids=token_ids,
            slots=slots,
            cos=cos,
            sin=sin,
            attention=plan,
            logit_rows=rows,
            sampled=[],
            scored=[],
            positions=positions,
            local=self._local.at(positions) if self._local else None,
        )

    def _advance(self, row: Row, sequences: dict[int, SequenceState]) -> SequenceState:
        state = sequences.get(row.seq)
        if state is None:
            raise GroupLost(f"plan names sequence {row.seq}, which this rank does not know")
        state.blocks += row.new_blocks
        state.num_computed += row.num_new
        room = len(state.blocks) * self._block_size
        if row.num_new < 1 or state.num_computed > min(room, len(state.token_ids)):
            raise GroupLost(
                f"plan computes {row.num_new} tokens of sequence {row.seq} up to "
                f"{state.num_computed}; it has {len(state.token_ids)} tokens and room for {room}"
            )
        return state

    def _tensor(self, array: np.ndarray) -> Tensor:
        return upload(array.astype(np.int64, copy=False), self._device)
