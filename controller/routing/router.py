"""What a replica would cost a request: seconds until its first token, and of others' time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .pace import Pace

UNMEASURED = Pace(tokens_per_s=1000.0, step_s=0.05, stream_s=0.01)
"""Stands in until some replica has been measured."""
PATIENCE = 0.1
"""What a second that a running stream is kept waiting counts, beside a second that somebody waits for
a first token. An answer of the usual 256 tokens that may take 50 ms each has some ten times the
time that its first token has."""


DISPLACED = 1.0
"""A token that is computed again takes the place of one that others have asked for; at worst that is
computed again as well. So nobody moves off a holder before waiting costs twice the computing."""
COPY_START_S = 0.02
"""Of a copy from replica to replica, before its first byte; four turns of two step loops."""
COPY_MARGIN = 0.5
"""A prefix is copied where that is predicted to take this part of computing it, or less."""
COPY_LEAST_TOKENS = 64


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
    prompts: int = 0
    """Prompts that the queued tokens are of."""

    @property
    def ahead(self) -> float:
        """Prompt tokens that are computed before those of whoever comes now: they are computed in
        order, and half of the first prompt is done by now, on average."""
        if not self.prompts:
            return self.queue_tokens
        return self.queue_tokens * (1.0 - 0.5 / self.prompts)


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
    copied_tokens: int = 0
    """Further tokens that are copied from another replica before it begins."""
    copy_s: float = 0.0
    """To copy them."""


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
    """The step that runs, and a step of the streams that are there."""
    wait_s: float
    """Until a place is free and the KV pool has room, where it has not."""
    load_s: float
    """To bring cached tokens back into the KV pool."""
    copied_tokens: int
    copy_s: float
    """To copy these from another replica before."""
    disturbance_s: float
    """What the streams there and those who come later lose."""

    @property
    def predicted_s(self) -> float:
        """Until the first token."""
        return self.copy_s + self.prefill_s + self.load_s + self.streams_s + self.wait_s

    @property
    def cost_s(self) -> float:
        """What is compared."""
        return self.predicted_s + self.disturbance_s

    def __str__(self) -> str:
        return (
            f"replica-{self.replica}: {self.cost_s:.4f} s = {self.prefill_s:.4f} prefill"
            f" + {self.load_s:.4f} load + {self.copy_s:.4f} copy"
            f" + {self.streams_s:.4f} streams + {self.wait_s:.4f} wait"
            f" + {self.disturbance_s:.4f} others ({self.cached_tokens} cached,"
            f" {self.copied_tokens} copied,"
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
    source: int | None = None
    """Where what is copied comes from, for whichever replica it is copied to."""

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


class Prices(NamedTuple):
    """What requests cost at a replica, waits and loads apart. One whose prompt takes `own_s` costs
    ``base_s + answer_s * output tokens + (slope + curve * own_s) * own_s``."""

    base_s: float
    answer_s: float
    token_s: float
    """Seconds of an uncached token."""
    slope: float
    curve: float


def steps_s(work: Work, pace: Pace) -> float:
    """A step of the streams that are there; where one of these runs now, half of it before."""
    step_s = pace.base_s + work.streams * (pace.stream_s or 0.0)
    return 1.5 * step_s if work.streams and not work.prompts else step_s


def prices(work: Work, pace: Pace) -> Prices:
    """Of a replica that has this to do. See `estimate`."""
    streams = work.streams
    token_s = 1.0 / (pace.tokens_per_s or 1.0)
    queue_s = work.ahead * token_s
    streams_s = streams * (pace.stream_s or 0.0)
    left_s = work.output_tokens * (pace.step_s or 0.0)
    arrivals = 0.5 * streams * streams / left_s if left_s > 0.0 else 0.0
    return Prices(
        queue_s + steps_s(work, pace),
        2.0 * PATIENCE * streams_s,
        token_s,
        1.0 + DISPLACED + arrivals * queue_s + PATIENCE * streams,
        0.5 * arrivals,
    )


def waited_s(request: Request, candidate: Candidate) -> float:
    """Until a place is free and the KV pool has room."""
    work = candidate.work
    crowd = shortage = 0.0
    if candidate.places:
        beyond = work.streams + request.samples - candidate.places
        crowd = min(max(beyond, 0), work.streams) / candidate.places
    if candidate.room:
        needed = request.tokens - candidate.cached_tokens + request.output_tokens  # copied ones too
        lacking = work.kv_tokens + needed - candidate.room
        shortage = min(max(lacking, 0), work.kv_tokens) / max(work.kv_tokens, 1)
    if not crowd and not shortage:
        return 0.0
    left_s = work.output_tokens / max(work.streams, 1) * (candidate.pace.step_s or 0.0)
    return max(crowd, shortage) * left_s


def estimate(request: Request, candidate: Candidate) -> Estimate:
    """The formula::

        own     = (tokens - cached - copied) / tokens_per_s
        queue   = queued tokens that are ahead / tokens_per_s
        prefill = queue + own
        load    = cached tokens in host memory * host_token_s + those on disk * disk_token_s
        copy    = COPY_START_S + copied * bytes of a token / bytes_per_s
        streams = base_s + streams * stream_s, and half of that if only streams are there
        wait    = max(samples beyond the places / places, tokens beyond the room / tokens there)
                  * (mean output left) * step_s
        others  = DISPLACED * own + arrivals * own * (queue + own / 2)
                  + PATIENCE * streams * (own + 2 * stream_s * output)

    Tokens whose load would take longer than computing them do not count as cached. Copied are the
    tokens that the best holder has and this replica has not, where they are at least
    `COPY_LEAST_TOKENS` and that is predicted to take `COPY_MARGIN` of computing them. wait and arrivals
    are Little's law: places and room are given back at the rate at which streams end, and requests
    come at the rate at which they end, ``streams / (2 * mean output left * step_s)``, as a stream
    is half done on average. others is what this request costs those who are there and those who come:
    what it computes displaces what others have cached; who comes while the queue ahead is computed
    waits for all of this prompt, who comes while it is computed itself, for half of it on average
    (Haviv and Ritov 1998); every stream stands still for as long as the prompt is computed, and has
    longer steps while the answer is, as the answer itself has from every stream. As all of it grows with what a replica has been given, the holder of a
    popular prefix loses its advantage once it costs more to wait for it than to compute the prefix
    again; whoever does so holds the prefix from then on.
    """
    work, pace = candidate.work, candidate.pace
    price = prices(work, pace)
    uncached = request.tokens - candidate.cached_tokens - candidate.copied_tokens
    own_s = uncached * price.token_s
    queue_s = work.ahead * price.token_s
    others_s = (price.slope - 1.0 + price.curve * own_s) * own_s
    return Estimate(
        replica=candidate.replica,
        cached_tokens=candidate.cached_tokens,
        work=work,
        tokens_per_s=pace.tokens_per_s or 1.0,
        prefill_s=queue_s + own_s,
        streams_s=steps_s(work, pace),
        wait_s=waited_s(request, candidate),
        load_s=candidate.load_s,
        copied_tokens=candidate.copied_tokens,
        copy_s=candidate.copy_s,
        disturbance_s=others_s + price.answer_s * request.output_tokens,
    )
