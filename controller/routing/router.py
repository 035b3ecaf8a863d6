"""Which replica gets a request: the one predicted to give its first token soonest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .pace import Pace

UNMEASURED = Pace(tokens_per_s=1000.0, step_s=0.05, stream_s=0.01)
"""Stands in until some replica has been measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A live replica as the router sees it, for one request."""

    index: int
    cached_tokens: int = 0
    """Tokens of the prompt that it holds the KV entries of."""
    queue_tokens: int = 0
    """Prompt tokens of other requests that it has yet to compute: queued and running ones."""
    streams: int = 0
    """Samples that were given to it and have not ended."""
    output_tokens: int = 0
    """Tokens that those may still generate."""
    places: int | None = None
    """Samples that it computes together at most; None: no bound."""
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What was predicted for a candidate, in seconds until the first token, and from what."""

    index: int
    cached_tokens: int
    queue_tokens: int
    streams: int
    tokens_per_s: float
    prefill_s: float
    """To compute the tokens ahead, and those of the prompt that are not cached."""
    streams_s: float
    """For the streams that share its steps."""
    place_s: float
    """Until a place is free, where all are taken."""

    @property
    def predicted_s(self) -> float:
        """All of it."""
        return self.prefill_s + self.streams_s + self.place_s


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, with the numbers that say why."""

    index: int
    prompt_tokens: int
    estimates: tuple[Estimate, ...]
    """One for each candidate, by index."""

    @property
    def uncached_tokens(self) -> int:
        """Tokens that the chosen replica has to compute."""
        chosen = next(item for item in self.estimates if item.index == self.index)
        return self.prompt_tokens - chosen.cached_tokens

    def __str__(self) -> str:
        lines = "; ".join(
            f"replica-{item.index}: {item.predicted_s:.4f} s = {item.prefill_s:.4f} prefill"
            f" + {item.streams_s:.4f} streams + {item.place_s:.4f} place"
            f" ({item.cached_tokens} cached, {item.queue_tokens} queued,"
            f" {item.streams} streams, {item.tokens_per_s:.0f} tokens/s)"
            for item in self.estimates
        )
        return f"replica-{self.index} for {self.prompt_tokens} tokens: {lines}"


def route(prompt_tokens: int, samples: int, candidates: Sequence[Candidate]) -> Decision:
    """Choose the candidate that is predicted to give the first token soonest::

        (queue_tokens + prompt_tokens - cached_tokens) / tokens_per_s + streams * stream_s + place

        place = (samples beyond the places) / places * (mean output left) * step_s

    place is Little's law: places are given back at the rate at which streams end. As all of it
    grows with the requests that a replica has been given, the holder of a popular prefix loses
    its advantage once it costs more to wait for it than to compute the prefix again; whoever does
    so holds the prefix from then on. Ties go to the lowest index. A replica that was not measured
    yet counts as the fastest that was.

    prompt_tokens: to compute if nothing is cached. samples: of the request. candidates: at least
    one.
    """
    paces = [candidate.pace for candidate in candidates]
    rate = _known(max, (pace.tokens_per_s for pace in paces), UNMEASURED.tokens_per_s)
    step_s = _known(min, (pace.step_s for pace in paces), UNMEASURED.step_s)
    stream_s = _known(min, (pace.stream_s for pace in paces), UNMEASURED.stream_s)
    fastest = Pace(rate, step_s, stream_s)
    estimates = [
        _estimate(prompt_tokens, samples, candidate, fastest)
        for candidate in sorted(candidates, key=lambda candidate: candidate.index)
    ]
    best = min(estimates, key=lambda estimate: (estimate.predicted_s, estimate.index))
    return Decision(best.index, prompt_tokens, tuple(estimates))


def _estimate(prompt_tokens: int, samples: int, candidate: Candidate, fastest: Pace) -> Estimate:
    pace = candidate.pace
    rate = pace.tokens_per_s or fastest.tokens_per_s or 1.0
    step_s = pace.step_s or fastest.step_s or 0.0
    stream_s = pace.stream_s or fastest.stream_s or 0.0
    streams, places = candidate.streams, candidate.places
    beyond = 0 if places is None else min(max(streams + samples - places, 0), streams)
    output_left = candidate.output_tokens / streams if streams else 0.0
    return Estimate(
        index=candidate.index,
        cached_tokens=candidate.cached_tokens,
        queue_tokens=candidate.queue_tokens,
        streams=streams,
        tokens_per_s=rate,
        prefill_s=(candidate.queue_tokens + prompt_tokens - candidate.cached_tokens) / rate,
        streams_s=streams * stream_s,
        place_s=beyond / places * output_left * step_s if places else 0.0,
    )


def _known(
    best: Callable[[Iterable[float]], float],
    values: Iterable[float | None],
    otherwise: float | None,
) -> float | None:
    measured = [value for value in values if value]
    return best(measured) if measured else otherwise
