"""Typed errors as gRPC statuses with `google.rpc` details, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from .errors import (
    AlreadyExists,
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    ModelError,
    NotFound,
    PermissionDenied,
    PhalanxError,
    RequestFailed,
    ResourceExhausted,
    SetAside,
    Unauthenticated,
    Unavailable,
)

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
DEFAULT_RETRY_S = 1.0
QUARANTINE = "QUARANTINE"
# Trailers travel as headers, which clients refuse beyond 8 KiB in all.
MAX_TEXT_BYTES = 600
MAX_DETAILS_BYTES = 3072

Trailers = tuple[tuple[str, str | bytes], ...]

_TYPES: dict[str, type[PhalanxError]] = {
    kind.status: kind
    for kind in (
        DeadlineExceeded,
        NotFound,
        AlreadyExists,
        PermissionDenied,
        Unauthenticated,
        ModelError,
        RequestFailed,
    )
}


def encode(error: PhalanxError) -> tuple[grpc.StatusCode, str, Trailers]:
    """(code, text, trailing metadata) of an error.

    `InvalidArgument` carries `BadRequest` with a violation per field, as many as trailers hold;
    `ResourceExhausted`, and `Unavailable` where it knows when, carry `RetryInfo` and
    `grpc-retry-pushback-ms`. `SetAside` carries `PreconditionFailure`, which tells it from other
    failed preconditions.
    """
    code = grpc.StatusCode[error.status]
    text = _shortened(str(error))
    status = status_pb2.Status(code=code.value[0], message=text)
    trailers: Trailers = ()
    if isinstance(error, InvalidArgument):
        status.details.add().Pack(_bad_request(error.violations, MAX_DETAILS_BYTES))
    elif isinstance(error, ResourceExhausted | Unavailable) and error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        milliseconds = max(0, round(error.retry_after_s * 1000))
        retry.retry_delay.FromMilliseconds(milliseconds)
        status.details.add().Pack(retry)
        trailers = ((PUSHBACK_KEY, str(milliseconds)),)
    elif isinstance(error, SetAside):
        failure = error_details_pb2.PreconditionFailure()
        failure.violations.add(type=QUARANTINE)
        status.details.add().Pack(failure)
    else:
        return code, text, ()
    return code, text, ((DETAILS_KEY, status.SerializeToString()), *trailers)


def decode(
    code: grpc.StatusCode, text: str, trailers: Iterable[tuple[str, str | bytes]]
) -> PhalanxError:
    """The error that a status stands for; one without a type of its own is a `PhalanxError`."""
    details = _details(trailers)
    retry = error_details_pb2.RetryInfo()
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        violations = [FieldViolation(item.field, item.description) for item in _violations(details)]
        return InvalidArgument(violations or [FieldViolation("request", text)])
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        told = any(detail.Unpack(retry) for detail in details)
        if not told and "larger than max" in text:  # the library's own words: no time helps
            return InvalidArgument.of("request", text)
        delay = retry.retry_delay.ToMilliseconds() / 1000 if told else DEFAULT_RETRY_S
        return ResourceExhausted(text, delay)
    if code is grpc.StatusCode.UNAVAILABLE:
        told = any(detail.Unpack(retry) for detail in details)
        return Unavailable(text, retry.retry_delay.ToMilliseconds() / 1000 if told else None)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        failure = error_details_pb2.PreconditionFailure()
        if any(detail.Unpack(failure) for detail in details):
            return SetAside(text)
    kind = _TYPES.get(code.name)
    return kind(text) if kind else PhalanxError(f"{code.name}: {text}")


def _shortened(text: str) -> str:
    data = text.encode()
    if len(data) <= MAX_TEXT_BYTES:
        return text
    return data[: MAX_TEXT_BYTES - 3].decode(errors="ignore") + "..."


def _bad_request(violations: Iterable[FieldViolation], room: int) -> error_details_pb2.BadRequest:
    """As many violations as fit into `room` bytes; the last one says how many do not."""
    message = error_details_pb2.BadRequest()
    left = list(violations)
    while left:
        field, description = _shortened(left[0].field), _shortened(left[0].description)
        item = message.field_violations.add(field=field, description=description)
        if message.ByteSize() > room:
            item.field, item.description = "request", f"{len(left)} more violations"
            break
        del left[0]
    return message


def _details(trailers: Iterable[tuple[str, str | bytes]]) -> list[Any]:
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []


def _violations(details: list[Any]) -> list[error_details_pb2.BadRequest.FieldViolation]:
    message = error_details_pb2.BadRequest()
    for detail in details:
        if detail.Unpack(message):
            break
    return list(message.field_violations)
