"""What goes into the scheduler and what comes out: requests and token events."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from phalanx.protos.errors import PhalanxError
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import PromptLogprobs, SampledToken


class FinishReason(Enum):
    """Why a sample ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True, kw_only=True)
class Request:
    """One sample of one request. `output_token_ids` grows; all else stays as it was given.

    `arrival` and `deadline` are seconds of `time.monotonic()`.
    """

    request_id: str
    sample_index: int = 0
    prompt_token_ids: list[int]
    params: SamplingParams
    tenant: str = "default"
    arrival: float
    deadline: float | None = None
    priority: int = 0
    """Within its tenant, the lower one comes first."""
    output_token_ids: list[int] = field(default_factory=list)
    probation: int = 0
    """Tokens that it must give alone before it runs with others; see `probation.py`."""
    trace: Any = None
    """Whoever traces it, handed on; nothing here depends on it."""

    @property
    def key(self) -> tuple[str, int]:
        """Names the sample in its replica."""
        return self.request_id, self.sample_index


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """News of one sample. Every sample has exactly one event with `finish` set, its last."""

    request_id: str
    sample_index: int
    first_index: int
    """Index of the first of `tokens` within the sample's output."""
    tokens: tuple[SampledToken, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    """The end-of-sequence or stop token that ended the sample; also the last of `tokens`."""
    error: PhalanxError | None = None
    """With `FinishReason.ERROR` only."""
    cached_prompt_tokens: int = 0
    """Prompt tokens that the prefix cache spared at the first admission."""
    prompt_logprobs: PromptLogprobs | None = None
    """A run of scored prompt tokens, on the way to the first token; sample 0 only."""
