"""Errors as OpenAI's clients know them: an HTTP status and a JSON object."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from aiohttp import web

from phalanx.protos.errors import InvalidArgument, PhalanxError, ResourceExhausted, Unavailable

STATUSES = {
    "INVALID_ARGUMENT": (400, "invalid_request_error", None),
    "FAILED_PRECONDITION": (400, "invalid_request_error", None),
    "UNAUTHENTICATED": (401, "invalid_request_error", "invalid_api_key"),
    "PERMISSION_DENIED": (403, "invalid_request_error", "permission_denied"),
    "NOT_FOUND": (404, "invalid_request_error", "model_not_found"),
    "ALREADY_EXISTS": (409, "invalid_request_error", None),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", "rate_limit_exceeded"),
    "UNAVAILABLE": (503, "server_error", "unavailable"),
    "DEADLINE_EXCEEDED": (504, "server_error", "timeout"),
    "INTERNAL": (500, "server_error", None),
}
"""gRPC status name to (HTTP status, type, code)."""


def error_object(error: PhalanxError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; param is the first wrong field."""
    _, kind, code = STATUSES[error.status]
    param = None
    if isinstance(error, InvalidArgument) and error.violations:
        param = error.violations[0].field
    return _object(str(error), kind, param, code)


def error_response(error: PhalanxError) -> web.Response:
    """The whole answer to a refused request."""
    status = STATUSES[error.status][0]
    headers = {}
    if isinstance(error, ResourceExhausted | Unavailable) and error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _response(status, error_object(error), headers)


def http_error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    """An error of HTTP itself: no such path, a method, a size."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _response(status, _object(message, kind, None, None), headers or {})


def _object(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(status: int, value: dict[str, Any], headers: dict[str, str]) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        headers=headers,
        content_type="application/json",
    )
