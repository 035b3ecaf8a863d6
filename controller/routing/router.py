"""Which replica gets a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as the router sees it."""

    index: int
    open_tokens: int
    """Prompt tokens plus allowed output tokens of the requests that it has not finished."""


def least_loaded(candidates: Sequence[Candidate]) -> Candidate:
    """The replica with the fewest tokens before it; ties go to the lowest index.

    candidates: the live replicas, at least one.
    """
    return min(candidates, key=lambda candidate: (candidate.open_tokens, candidate.index))
