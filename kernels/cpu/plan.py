"""A step's attention, prepared for the CPU: rows sorted by shape, tables and masks as tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phalanx.kernels.interface import SequenceSpan


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query row each and similar lengths, padded to the longest."""

    rows: Tensor  # [B] batch rows
    blocks: Tensor  # [B * blocks per sequence]
    padding: Tensor | None  # [B, 1, tokens] additive -inf, None where nothing is hidden
    tokens: int
    lengths: Tensor  # [B]


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence with several query rows."""

    rows: slice
    blocks: Tensor  # [blocks]
    length: int
    mask: Tensor | None  # [queries, length]; None = square causal


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of a step, for layers of one window."""

    decode: list[DecodeGroup]
    prefill: list[PrefillSpan]


class CpuPlan:
    """Prepares a step once for each window that its layers have."""

    def __init__(self, spans: Sequence[SequenceSpan], block_size: int) -> None:
        self._spans, self._block_size = spans, block_size
        self._longest = max((span.length for span in spans), default=0)
        self._steps = {0: _step(spans, block_size, 0)}

    def within(self, window: int) -> Step:
        """The step of layers that see `window` tokens, 0 = all."""
        if window >= self._longest:
            window = 0
        if window not in self._steps:
            spans = [_shortened(span, self._block_size, window) for span in self._spans]
            self._steps[window] = _step(spans, self._block_size, window)
        return self._steps[window]


def _shortened(span: SequenceSpan, block_size: int, window: int) -> SequenceSpan:
    """Without the leading blocks that no query of the span sees."""
    skip = max(span.length - span.num_query - window + 1, 0) // block_size
    length = span.length - skip * block_size
    return SequenceSpan(span.start, span.num_query, length, span.blocks[skip:])


def _step(spans: Sequence[SequenceSpan], block_size: int, window: int) -> Step:
    """Decode rows by the power of two of their block count, and prefills."""
    by_size: defaultdict[int, list[SequenceSpan]] = defaultdict(list)
    prefill = []
    for span in spans:
        if span.num_query == 1:
            by_size[(-(-span.length // block_size) - 1).bit_length()].append(span)
        else:
            prefill.append(_prefill_span(span, block_size, window))
    return Step([_decode_group(group, block_size, window) for group in by_size.values()], prefill)


def _decode_group(spans: Sequence[SequenceSpan], block_size: int, window: int) -> DecodeGroup:
    longest = max(span.length for span in spans)
    width = -(-longest // block_size)
    table = torch.zeros(len(spans), width, dtype=torch.int64)
    for row, span in enumerate(spans):
        used = -(-span.length // block_size)
        table[row, :used] = torch.tensor(span.blocks[:used])
    lengths = torch.tensor([span.length for span in spans])
    tokens = width * block_size
    positions = torch.arange(tokens)
    hidden = positions >= lengths[:, None]
    if window:
        hidden |= positions < lengths[:, None] - window
    padding = None
    if bool(hidden.any()):
        padding = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf).unsqueeze(1)
    rows = torch.tensor([span.start for span in spans])
    return DecodeGroup(rows, table.flatten(), padding, tokens, lengths)


def _prefill_span(span: SequenceSpan, block_size: int, window: int) -> PrefillSpan:
    blocks = torch.tensor(span.blocks[: -(-span.length // block_size)])
    rows = slice(span.start, span.start + span.num_query)
    mask = None
    if span.num_query < span.length or 0 < window < span.length:
        positions = torch.arange(span.length)
        queries = positions[-span.num_query :, None]
        mask = positions[None, :] <= queries
        if window:
            mask &= positions[None, :] > queries - window
    return PrefillSpan(rows, blocks, span.length, mask)
