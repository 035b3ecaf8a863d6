"""What the parts of a request's way say of it, and how they find whom to say it to.

`PARENT` is set by whoever takes a call, `TRACE` by the service; both belong to the call's task
and to the tasks that it begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Protocol

MAX_CHARS = 512


class RequestTrace(Protocol):
    """One traced request. Its methods may be called on any thread, and are quick."""

    @property
    def trace_id(self) -> str:
        """Of the whole tree, 32 hexadecimal digits."""

    def admitted(self, request_id: str, prompt_tokens: int) -> None:
        """It was checked and tokenised."""

    def placed(self, replica_id: str, uncached_tokens: int) -> None:
        """A replica got it; from now on it waits there for its first step."""

    def homeless(self) -> None:
        """No replica can take it now."""

    def stepped(self, *, decoding: bool) -> str:
        """It is in the plan that leaves now, with its prompt or with tokens fed back. The `traceparent` for what the ranks do in this step;
        empty where they need not tell."""

    def got_tokens(self, count: int) -> None:
        """So many tokens came."""

    def lost(self) -> None:
        """Its ranks are gone; it will be placed again, or ended."""

    def finished(self) -> None:
        """The engine is done with it."""

    def end(self, outcome: str, completion_tokens: int) -> None:
        """The call is over."""


class Tracing(Protocol):
    """Begins traces."""

    def begin(self, method: str, parent: tuple[str, str]) -> RequestTrace | None:
        """A request came in, with its caller's `traceparent` and `tracestate` or empty texts; None
        where it is not traced."""


PARENT: ContextVar[tuple[str, str]] = ContextVar("traceparent", default=("", ""))
TRACE: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)


def note_parent(headers: Iterable[tuple[str, str | bytes]]) -> None:
    """Set `PARENT` from a call's headers or metadata, whose names are in lower case."""
    parent = state = ""
    for name, value in headers:
        if isinstance(value, str) and len(value) <= MAX_CHARS:
            if name == "traceparent":
                parent = value
            elif name == "tracestate":
                state = value
    PARENT.set((parent, state))
