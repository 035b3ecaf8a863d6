"""What crosses between the step loop and the ranks at every step.

A sequence is described in full once (`NewSequence`), then only by what changed (`Row`). Sampled
tokens feed back on the rank itself: a plan never repeats them, so the plan of step n + 1 can be
sent before the tokens of step n have reached the scheduler.
"""

from __future__ import annotations

import msgspec

from .moves import Move
from .sampling import SamplingParams


class NewSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that the ranks have not seen, in full."""

    seq: int
    """Attempt id: unique for the life of the group; a re-admitted request gets a new one."""
    token_ids: list[int]
    """Prompt, then the output tokens known so far."""
    num_prompt: int
    """How many of `token_ids` are prompt."""
    num_computed: int
    """Leading tokens whose KV entries already stand in the blocks (prefix hit or fork)."""
    params: SamplingParams
    sample_index: int = 0
    """Which of the request's n samples this is; part of the random key."""


NO_STATE = -1
"""In place of a slot to read: states begin as zeros."""


class StateSave(msgspec.Struct, frozen=True, array_like=True):
    """The states as they are behind the row's first `num_tokens` tokens also go to `slot`."""

    num_tokens: int
    slot: int


class StateUse(msgspec.Struct, frozen=True, array_like=True):
    """Where a row finds and leaves its states. No other row of the step writes any slot of these."""

    read: int
    """Slot of the states before the row's first token, or `NO_STATE`."""
    write: int
    """Slot of those behind its last."""
    saves: list[StateSave] = []
    """By rising `num_tokens`, which are in [1, num_new]."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's work in this step.

    The rank computes the next `num_new` tokens of the sequence. When that reaches the last token
    that the rank knows, the rank samples one token and appends it to the sequence.
    """

    seq: int
    num_new: int
    new_blocks: list[int]
    """Block ids appended to the sequence's block table before computing."""
    state: StateUse | None = None
    """Given where the model has state spaces."""


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """Copy a whole KV block, before this step computes anything (fork of a partial block)."""

    source: int
    target: int


MAX_TRACES = 8


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag="plan"):
    """One step for every rank of a group, executed strictly in order of `step`."""

    epoch: int
    step: int
    finished: list[int]
    """Sequences to forget before anything else (ended, aborted or preempted)."""
    new: list[NewSequence]
    copies: list[BlockCopy]
    rows: list[Row]
    """The work, including that of `new`; the order is the order of the batch."""
    traces: list[str] = []
    """W3C `traceparent`s of spans that the ranks tell of this step under, `MAX_TRACES` at most; what
    they compute does not depend on it."""
    moves: list[Move] = []
    """Begun before `copies`: what is stored is as it was before this plan."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return sum(row.num_new for row in self.rows)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one token under the unmodified model distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 = the most likely token."""


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token of one sequence."""

    seq: int
    token_id: int
    logprob: TokenLogprob | None = None
    top: list[TokenLogprob] = []


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of consecutive prompt tokens, starting at prompt index `start` (>= 1)."""

    seq: int
    start: int
    tokens: list[TokenLogprob]
    top: list[list[TokenLogprob]]


class SequenceFailure(msgspec.Struct, frozen=True, array_like=True):
    """This sequence failed on the ranks; the others of the step are unaffected."""

    seq: int
    message: str
    field: str = ""
    """The request's field that is to blame; empty: none of them."""


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag="result"):
    """What the first rank of the last stage answers to a plan."""

    epoch: int
    step: int
    sampled: list[SampledToken]
    prompt_logprobs: list[PromptLogprobs] = []
    failures: list[SequenceFailure] = []
    execute_s: float = 0.0
    """Seconds that the rank spent on this step."""
    idle_s: float | None = None
    """Seconds since the rank's last step that it spent on none; None before the second one."""
