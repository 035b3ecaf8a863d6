"""What a replica would cost a request: seconds until its first token, and of others' time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .pace import Pace

UNMEASURED = Pace(tokens_per_s=1000.0, step_s=0.05, stream_s=0.01)
"""Stands in until some replica has been measured."""
DISTURBANCE = 0.1
"""What a second that one running stream is kept waiting counts, beside a second of the request's
own wait for its first token."""
SUCCESSORS = 1.0
"""The same of a second that its prompt takes, for those who come after it: computing again what
another replica holds takes the place of other prompts."""


class Work(NamedTuple):
    """What a replica has been given to do, or one request's part of it."""

    queue_tokens: int = 0
    """Prompt tokens that it has yet to compute: queued and running ones."""
    streams: int = 0
    """Samples that have not ended."""
    output_tokens: int = 0
    """Tokens that those are expected to generate yet."""
    kv_tokens: int = 0
    """Tokens that those will have when they end, as expected: prompts and outputs."""


NOTHING = Work()


class Request(NamedTuple):
    """What is to be placed."""

    tokens: int
    """To compute before its first token comes, if nothing is cached."""
    samples: int = 1
    output_tokens: int = 0
    """Expected of all its samples."""


class Candidate(NamedTuple):
    """A live replica as the router sees it, for one request."""

    replica: int
    cached_tokens: int = 0
    """Tokens of the prompt that it holds the KV entries of."""
    work: Work = NOTHING
    places: int | None = None
    """Samples that it computes together at most; None: no bound."""
    room: int | None = None
    """Tokens that its KV pool holds; None: no bound."""
    pace: Pace = UNMEASURED
    """Measured, the first three."""
    load_s: float = 0.0
    """To bring those of the cached tokens back into the pool that are below it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What was predicted for a candidate, in seconds, and from what."""

    replica: int
    cached_tokens: int
    work: Work
    tokens_per_s: float
    prefill_s: float
    """To compute the tokens ahead, and those of the prompt that are not cached."""
    streams_s: float
    """For the streams that share its steps."""
    wait_s: float
    """Until a place is free and the KV pool has room, where it has not."""
    load_s: float
    """To bring cached tokens back into the KV pool."""
    disturbance_s: float
    """What the streams there and those who come later lose, as weighted."""

    @property
    def predicted_s(self) -> float:
        """Until the first token."""
        return self.prefill_s + self.load_s + self.streams_s + self.wait_s

    @property
    def cost_s(self) -> float:
        """What is compared."""
        return self.predicted_s + self.disturbance_s

    def __str__(self) -> str:
        return (
            f"replica-{self.replica}: {self.cost_s:.4f} s = {self.prefill_s:.4f} prefill"
            f" + {self.load_s:.4f} load"
            f" + {self.streams_s:.4f} streams + {self.wait_s:.4f} wait"
            f" + {self.disturbance_s:.4f} others ({self.cached_tokens} cached,"
            f" {self.work.queue_tokens} queued, {self.work.streams} streams,"
            f" {self.tokens_per_s:.0f} tokens/s)"
        )


class Decision(NamedTuple):
    """Where a request goes, with the numbers that say why."""

    replica: int
    request: Request
    compared: tuple[Candidate, ...]
    """The cheapest ones, the chosen one first."""
    candidates: int
    """Replicas that were compared."""

    @property
    def uncached_tokens(self) -> int:
        """Tokens that the chosen replica has to compute."""
        return self.request.tokens - self.compared[0].cached_tokens

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """What the cheapest ones would cost, the chosen one first."""
        return tuple(estimate(self.request, candidate) for candidate in self.compared)

    def __str__(self) -> str:
        lines = "; ".join(map(str, self.estimates))
        return (
            f"replica-{self.replica} of {self.candidates} for {self.request.tokens} tokens: {lines}"
        )


def estimate(request: Request, candidate: Candidate) -> Estimate:
    """The formula::

        prefill = (queued + tokens - cached) / tokens_per_s
        load    = cached tokens in host memory * host_token_s + those on disk * disk_token_s
        streams = streams * stream_s
        wait    = max(samples beyond the places / places, tokens beyond the room / tokens there)
                  * (mean output left) * step_s
        others  = (SUCCESSORS + DISTURBANCE * streams) * (tokens - cached) / tokens_per_s

    Tokens whose load would take longer than computing them do not count as cached. wait is Little's
    law: places and room are given back at the rate at which streams end. others counts the steps of
    running streams that the prompt makes longer, and its own time once more, for
    those who come after it. As all of it grows with what
    a replica has been given, the holder of a popular prefix loses its advantage once it costs more
    to wait for it than to compute the prefix again; whoever does so holds the prefix from then on.
    """
    work, pace = candidate.work, candidate.pace
    rate = pace.tokens_per_s or 1.0
    own_s = (request.tokens - candidate.cached_tokens) / rate
    crowd = shortage = 0.0
    if candidate.places:
        beyond = work.streams + request.samples - candidate.places
        crowd = min(max(beyond, 0), work.streams) / candidate.places
    if candidate.room:
        needed = request.tokens - candidate.cached_tokens + request.output_tokens
        lacking = work.kv_tokens + needed - candidate.room
        shortage = min(max(lacking, 0), work.kv_tokens) / max(work.kv_tokens, 1)
    left_s = work.output_tokens / max(work.streams, 1) * (pace.step_s or 0.0)
    return Estimate(
        replica=candidate.replica,
        cached_tokens=candidate.cached_tokens,
        work=work,
        tokens_per_s=rate,
        prefill_s=work.queue_tokens / rate + own_s,
        streams_s=work.streams * (pace.stream_s or 0.0),
        wait_s=max(crowd, shortage) * left_s,
        load_s=candidate.load_s,
        disturbance_s=(SUCCESSORS + DISTURBANCE * work.streams) * own_s,
    )
