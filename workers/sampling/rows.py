"""The rows of a batch: what is asked of each, and what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phalanx.protos.sampling import SamplingParams
from phalanx.workers.transfer import upload

from .random import stream_key


class SampleRow(NamedTuple):
    """One sequence that samples a token. `token_ids` is the caller's list; it is only read."""

    token_ids: Sequence[int]
    """Prompt, then output so far."""
    num_prompt: int
    params: SamplingParams
    sample_index: int
    allowed: bytes | None = None
    """A bit for each token that the grammar allows, see `GrammarState`; None: there is none."""

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is the only choice."""
    return params.temperature == 0.0 or params.top_k == 1


def is_filtered(params: SamplingParams, vocab_size: int) -> bool:
    """Whether some tokens are left out before one is drawn."""
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0


class Chosen(NamedTuple):
    """The decision on each row, in host memory; fields are [rows]."""

    token_ids: Tensor
    values: Tensor
    """float64: the winner's value; -inf when every token is banned."""
    raw: Tensor
    """float64: the winner's unmodified logit."""

    @classmethod
    def empty(cls, rows: int) -> Chosen:
        """Nothing chosen yet."""
        zeros = torch.zeros(rows, dtype=torch.float64)
        return cls(torch.zeros(rows, dtype=torch.int64), zeros, zeros.clone())

    def put(self, rows: Tensor, token_ids: Tensor, values: Tensor, raw: Tensor) -> None:
        """Write the decision on some rows."""
        self.token_ids[rows] = token_ids.to(torch.int64)
        self.values[rows] = values
        self.raw[rows] = raw


def stream_keys(rows: Sequence[SampleRow]) -> Tensor:
    """Random streams of the rows' next tokens, int64 [rows] in host memory."""
    keys = [stream_key(row.params.seed, row.sample_index, len(row.token_ids)) for row in rows]
    return torch.tensor(keys, dtype=torch.int64)


def select_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """`tensor[rows]` for ascending rows, without a copy when they are all."""
    if len(rows) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, upload(np.array(rows, dtype=np.int64), tensor.device))
