"""Log lines: for people, or as JSON objects, with the id of the request that they are about.

What users write is in none of them. That is why the text of an exception, which may quote it, is
left out: a line says which kind it was, and where.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TextIO

import msgspec

from .tracing.context import TRACE

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the running task is about."""


class Lines(logging.Formatter):
    """One line a record, `frames` of an exception aside."""

    def formatException(self, ei: Any) -> str:
        """Its kind and its frames, not its text."""
        kind, _, frames = ei
        return "".join(traceback.format_tb(frames)) + (kind.__name__ if kind else "no exception")

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """What the record says beside its message."""
        named: dict[str, Any] = dict(getattr(record, "fields", {}))
        if request_id := REQUEST_ID.get():
            named.setdefault("request_id", request_id)
        if (trace := TRACE.get()) is not None:
            named.setdefault("trace_id", trace.trace_id)
        return named

    def format(self, record: logging.LogRecord) -> str:
        """`2026-11-21T12:00:00.123Z warning phalanx.x: message field=value`"""
        shown = [f"{name}={value!r}" for name, value in self.fields(record).items()]
        head = f"{_time(record)} {record.levelname.lower()} {record.name}:"
        line = " ".join([head, record.getMessage(), *shown])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonLines(Lines):
    """The same as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """With time, level, logger and message before the fields."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line | self.fields(record) | line).decode()


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextlib.contextmanager
def logged_to(stream: TextIO, kind: str) -> Iterator[None]:
    """Write all log lines of this process, other packages' from warnings on, to `stream`.

    kind: "text" or "json".
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines() if kind == "json" else Lines())
    top = logging.getLogger()
    top.addHandler(handler)
    try:
        yield
    finally:
        top.removeHandler(handler)
