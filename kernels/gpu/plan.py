"""A step's attention as tensors on the device: what kernels and graphs read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phalanx.kernels.interface import SequenceSpan


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GpuPlan:
    """S sequences whose queries stand one behind the other.

    The tensors are read on the device alone, so a captured graph follows what is written into
    them between replays; the plain values choose kernels and grids, and are fixed by a capture.
    Sequence i has queries [starts[i], starts[i + 1]), the last of them at position
    lengths[i] - 1. A sequence of length 0 is padding: its rows come out as zeros.
    """

    tables: Tensor  # int32 [S, W], block ids in order
    lengths: Tensor  # int32 or int64 [S]
    starts: Tensor  # int32 [S + 1]
    prompt_lengths: Tensor
    """int32 [S + 1]: 0, then the length of each sequence with several queries, 0 for others."""
    block_size: int
    num_tokens: int
    max_length: int
    """No length exceeds it."""
    longest_query: int
    has_decodes: bool
    """Some sequences have one query."""
    has_prefills: bool
    """Some sequences have several."""

    @classmethod
    def of(cls, spans: Sequence[SequenceSpan], block_size: int, device: torch.device) -> GpuPlan:
        """The plan of a step; one copy to the device."""
        count = len(spans)
        used = [-(-span.length // block_size) for span in spans]
        width = max(used, default=1)
        packed = np.zeros(count * width + 3 * count + 2, dtype=np.int32)
        tables = packed[: count * width].reshape(count, width)
        for row, (span, blocks) in enumerate(zip(spans, used, strict=True)):
            tables[row, :blocks] = span.blocks[:blocks]
        queries = [span.num_query for span in spans]
        at = count * width
        packed[at : at + count] = [span.length for span in spans]
        starts = packed[at + count : at + 2 * count + 1]
        starts[1:] = np.cumsum(queries)
        prompts = [span.length if span.num_query > 1 else 0 for span in spans]
        packed[at + 2 * count + 2 :] = prompts
        if any(span.start != starts[row] for row, span in enumerate(spans)):
            raise ValueError("spans: their queries do not stand one behind the other")
        there = torch.from_numpy(packed).to(device)
        return cls(
            tables=there[:at].view(count, width),
            lengths=there[at : at + count],
            starts=there[at + count : at + 2 * count + 1],
            prompt_lengths=there[at + 2 * count + 1 :],
            block_size=block_size,
            num_tokens=sum(queries),
            max_length=max((span.length for span in spans), default=0),
            longest_query=max(queries, default=0),
            has_decodes=any(query == 1 for query in queries),
            has_prefills=any(query > 1 for query in queries),
        )

    @classmethod
    def decoding(cls, tables: Tensor, lengths: Tensor, block_size: int) -> GpuPlan:
        """One query for each sequence; both tensors are read when a layer attends.

        tables: int32 [S, W], contiguous in a row; lengths: int32 or int64 [S].
        """
        sequences, device = len(lengths), lengths.device
        return cls(
            tables=tables,
            lengths=lengths,
            starts=torch.arange(sequences + 1, dtype=torch.int32, device=device),
            prompt_lengths=torch.zeros(sequences + 1, dtype=torch.int32, device=device),
            block_size=block_size,
            num_tokens=sequences,
            max_length=tables.shape[1] * block_size,
            longest_query=1,
            has_decodes=True,
            has_prefills=False,
        )
