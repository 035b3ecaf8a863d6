"""Errors that cross a room's border, each with its gRPC status name.

A *recoverable* error ends one request; the server lives. A *fatal* one (`GroupLost`) ends a
group of ranks. Texts are written for the caller: they name the field, the value and what is
allowed, and hold no path, address or traceback of the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field: its dotted name and a sentence with the value and what is allowed."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class PhalanxError(Exception):
    """Root of all typed errors. `status` is the name of a `grpc.StatusCode`."""

    status: ClassVar[str] = "INTERNAL"
    recoverable: ClassVar[bool] = True


class InvalidArgument(PhalanxError):
    """The caller's input is wrong; every violation found is listed, not only the first."""

    status = "INVALID_ARGUMENT"

    def __init__(self, violations: list[FieldViolation]) -> None:
        super().__init__("; ".join(str(violation) for violation in violations))
        self.violations = violations

    @classmethod
    def of(cls, field: str, description: str) -> InvalidArgument:
        """An error with a single violation."""
        return cls([FieldViolation(field, description)])


class ResourceExhausted(PhalanxError):
    """The queue or a quota is full. `retry_after_s` (seconds) travels as `RetryInfo`."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(PhalanxError):
    """The request's deadline passed before it was finished."""

    status = "DEADLINE_EXCEEDED"


class NotFound(PhalanxError):
    """The named thing does not exist, or is not the caller's."""

    status = "NOT_FOUND"


class AlreadyExists(PhalanxError):
    """The id is taken by a live request."""

    status = "ALREADY_EXISTS"


class Unauthenticated(PhalanxError):
    """No bearer token, or a wrong one."""

    status = "UNAUTHENTICATED"


class PermissionDenied(PhalanxError):
    """The caller is known, and may not do this."""

    status = "PERMISSION_DENIED"


class Unavailable(PhalanxError):
    """Not ready yet, draining, or the group of ranks is being replaced. `retry_after_s` (seconds)
    travels as `RetryInfo` where it is known."""

    status = "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StreamLost(Unavailable):
    """A client's stream broke and could not be resumed. What had come before it is valid."""


class JournalLost(Unavailable):
    """The journal cannot be written, or is another controller's now: nothing more may be sent."""


class RequestFailed(PhalanxError):
    """This one request failed inside the engine (for example NaN logits); others go on."""

    status = "INTERNAL"


class SetAside(PhalanxError):
    """Groups of ranks died of this request, again and again; it is not run for a while."""

    status = "FAILED_PRECONDITION"


class ConfigError(PhalanxError):
    """The operator's configuration is refused: a flag, a size, a bind address."""

    status = "FAILED_PRECONDITION"


class ModelError(PhalanxError):
    """The checkpoint is missing, corrupt, incomplete or of an unsupported kind."""

    status = "FAILED_PRECONDITION"


class TransferFailed(PhalanxError):
    """KV blocks did not get from one replica to another; whoever needs them computes them.

    later: the same may succeed after a while, when there is room.
    """

    status = "UNAVAILABLE"

    def __init__(self, message: str, *, later: bool = False) -> None:
        super().__init__(message)
        self.later = later


class GroupLost(PhalanxError):
    """A rank of the group died, hung or disagreed: the whole group is gone.

    crashed: it failed by itself, perhaps over what it computed, as far as is known: by an error, a
    fatal signal of its own, or without an answer in time. Not so where it was killed or cut off.
    """

    status = "UNAVAILABLE"
    recoverable = False

    def __init__(self, message: str, *, crashed: bool = False) -> None:
        super().__init__(message)
        self.crashed = crashed
