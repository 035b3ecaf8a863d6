"""What is written down of every call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Any, Protocol, runtime_checkable

from phalanx.protos.errors import ResourceExhausted

from .answer import Answer
from .engine import Observer

CLOCK_SLACK_S = 0.1
REFUSED = ResourceExhausted.status.lower()
REFUSALS_S = 1.0

_log = logging.getLogger(__name__)


class Reader(Protocol):
    """Whom a stream goes to: a gRPC call's context, or what another front has in its place."""

    def time_remaining(self) -> float | None:
        """Seconds that the caller still waits; None for as long as it takes."""

    async def write(self, message: Any) -> None:
        """Send a message; returns when there is room for the next one."""


@runtime_checkable
class Counting(Protocol):
    """A reader that wants to know how long its prompt is before the first message."""

    def admitted(self, prompt_tokens: int) -> None:
        """The request was accepted, with a prompt of so many tokens."""


class RefusalLog:
    """Refusals for want of room in the log: one line a second for all of them, lest telling so many
    costs what refusing has saved. Belongs to one event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, tenant: str) -> None:
        """One request of the tenant was refused."""
        if not self._counts:
            asyncio.get_running_loop().call_later(REFUSALS_S, self.tell)
        self._counts[tenant] += 1

    def tell(self) -> None:
        """Write down what was noted."""
        counts, self._counts = self._counts, Counter()
        if counts:
            most, _ = counts.most_common(1)[0]
            fields = {"refused": counts.total(), "tenants": len(counts), "most_of": most}
            _log.info("requests were refused for want of room", extra={"fields": fields})


class Call:
    """The books of one call; times are of the monotonic clock. outlived: by a request that has an
    id of its caller's, so that the caller may come back to it."""

    def __init__(
        self,
        method: str,
        observer: Observer,
        reader: Reader,
        tenant: str,
        *,
        refusals: RefusalLog,
        outlived: bool = False,
    ) -> None:
        self.method, self.reader, self.tenant, self.outlived = method, reader, tenant, outlived
        self._observer, self._refusals = observer, refusals
        self._began = self._last = time.monotonic()
        self._any = False
        left = reader.time_remaining()
        self.deadline = None if left is None else self._began + left
        self.prompt_tokens = 0
        self.first_token_s: float | None = None
        self.answer: Answer | None = None
        self.outcome = "error"
        observer.on_start(method)

    @property
    def late(self) -> bool:
        """Whether the caller's deadline has passed; its own clock may be a little ahead."""
        return self.deadline is not None and time.monotonic() >= self.deadline - CLOCK_SLACK_S

    def hurry(self, seconds: float | None) -> None:
        """The request itself says in how many seconds from its arrival it must be finished."""
        if seconds is not None:
            ends = self._began + seconds
            self.deadline = ends if self.deadline is None else min(self.deadline, ends)

    def admitted(self, prompt_tokens: int) -> None:
        """The request was accepted."""
        self.prompt_tokens = prompt_tokens
        if isinstance(self.reader, Counting):
            self.reader.admitted(prompt_tokens)

    def sent(self, tokens: int) -> None:
        """A message with so many tokens left."""
        if not tokens:
            return
        now = time.monotonic()
        if self._any:
            self._observer.on_tokens(tokens, now - self._last)
        else:
            self.first_token_s = now - self._began
            self._observer.on_first_token(self.first_token_s)
        self._any, self._last = True, now

    @property
    def new_tokens(self) -> int:
        """Tokens of all samples that it brought."""
        return self.answer.new_tokens if self.answer is not None else 0

    def end(self) -> None:
        """The call is over."""
        tokens = self.new_tokens
        seconds = time.monotonic() - self._began
        self._observer.on_end(self.outcome, self.prompt_tokens, tokens, seconds)
        if self.outcome == REFUSED and self.answer is None:
            self._refusals.note(self.tenant)
        elif _log.isEnabledFor(logging.INFO):
            fields = {
                "method": self.method,
                "tenant": self.tenant,
                "outcome": self.outcome,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": tokens,
                "first_token_s": self.first_token_s and round(self.first_token_s, 6),
                "seconds": round(seconds, 6),
            }
            _log.info("a request has ended", extra={"fields": fields})
