"""Requests that may be what ranks died of, and how they run: one at a time, alone."""

from __future__ import annotations

from dataclasses import dataclass

from .sample import Sample, State

ELIGIBLE = (State.WAITING, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Computing:
    """What was being computed, should the ranks be lost now."""

    requests: frozenset[str] | None = None
    """None: that is not known."""
    alone: bool = False
    """Whether it was one request on probation, and nothing else."""

    def blames(self, request_id: str) -> bool:
        """Whether it may have been this request."""
        return self.requests is None or request_id in self.requests


class Probation:
    """Samples that run alone until they have given some tokens.

    While there are any, every other step is of one of them only, and no step is sent before the
    result of the last one is here: should the ranks die again, it is known of what. The others go
    on in the steps between. One is cleared before the next has its turn.
    """

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], Sample] = {}
        self._due = True

    def __len__(self) -> int:
        return len(self._samples)

    def __contains__(self, sample: Sample) -> bool:
        return sample.request.key in self._samples

    def add(self, sample: Sample, tokens: int) -> None:
        """A sample has arrived that must give so many tokens alone; 0: it need not."""
        sample.probation = tokens
        if tokens:
            self._samples[sample.request.key] = sample

    def gave_token(self, sample: Sample) -> None:
        """It has, and the ranks live."""
        if sample.probation:
            sample.probation -= 1
            if not sample.probation:
                self.remove(sample)

    def remove(self, sample: Sample) -> None:
        """It has ended, or is cleared."""
        self._samples.pop(sample.request.key, None)

    def next(self) -> Sample | None:
        """Whose turn it is to run alone, the longest here first; None: the others have theirs."""
        self._due = not self._due
        return None if self._due else self.first

    @property
    def first(self) -> Sample | None:
        """Who would be next."""
        return next((item for item in self._samples.values() if item.state in ELIGIBLE), None)
