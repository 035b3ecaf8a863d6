"""Which decode steps GPUs record, and how large they are."""

from __future__ import annotations

from .specs import DecoderSpec

MAX_RECORDED_ROWS = 512
"""Rows of the largest step that a GPU records; larger ones run as they come."""
RECORDED_LOGIT_ROWS = 256
"""Rows of logits that exist at a time in a recorded step."""


def counts_tokens(max_running: int) -> bool:
    """Whether GPUs count the tokens of running sequences, for penalties in recorded steps."""
    return max_running <= MAX_RECORDED_ROWS


def records_steps(model: DecoderSpec, pp_size: int) -> bool:
    """Whether GPUs record decode steps: not where the host must know more of a step than its rows,
    as for experts, for states and between stages."""
    return pp_size == 1 and model.experts is None and model.state is None
