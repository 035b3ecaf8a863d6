"""What surrounds every call: parsing, errors to statuses, who is calling, and how many may."""

from __future__ import annotations

import inspect
import logging
import secrets
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from phalanx.controller.tracing.context import note_parent
from phalanx.protos.errors import InvalidArgument, PhalanxError, ResourceExhausted
from phalanx.protos.limits import MAX_CONCURRENT_CALLS
from phalanx.protos.status import encode

from .rights import check_right
from .security import Keys

OPEN_METHODS = "/grpc.health.v1.Health/"

BUSY_RETRY_S = 1.0

_log = logging.getLogger(__name__)


async def abort(context: Any, error: PhalanxError) -> NoReturn:
    """End the call with the error's status and details."""
    code, text, trailers = encode(error)
    await context.abort(code, text, trailers)
    raise error  # not reached: abort raises


def logged_incident(method: str, error: Exception) -> str:
    """What a caller is told of a defect of ours: an incident id.

    The log gets where it happened, and not the error's text, which may hold what users wrote.
    """
    incident = secrets.token_hex(6)
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("incident %s in %s: %s\n%s", incident, method, type(error).__name__, frames)
    return f"internal error, incident {incident}"


async def contain(context: Any, method: str, error: Exception) -> NoReturn:
    """End the call because of a defect of ours."""
    await context.abort(grpc.StatusCode.INTERNAL, logged_incident(method, error))
    raise error  # not reached: abort raises


class Containment(grpc.GenericRpcHandler):
    """Takes every call: whatever its handler raises ends the call, with a proper status.

    Requests are parsed here, so that bytes that are no message are the caller's fault. So many
    calls may be open, health checks beside them; more are refused before they are parsed. With
    `tokens`, nothing but health checks is answered without a known bearer token, and nothing that
    its role may not call; nor methods that do not exist.

    In place of interceptors, for which the library makes a task more and every call's handler anew.
    Services are added to it as to a server, before it serves.
    """

    def __init__(self, max_open: int = MAX_CONCURRENT_CALLS, tokens: Keys | None = None) -> None:
        self._max_open, self._tokens, self._open = max_open, tokens, 0
        self._services: list[grpc.GenericRpcHandler] = []
        self._handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """As of a `grpc.aio.Server`."""
        self._services += handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """As of a `grpc.aio.Server`, which has no use for them."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call that has just come; None: there is no such method."""
        method, metadata = details.method, details.invocation_metadata or ()
        note_parent(metadata)
        if self._tokens is not None and not method.startswith(OPEN_METHODS):
            try:
                check_right(method, self._tokens.caller(metadata))
            except PhalanxError as refused:
                return _refusing(refused)
        handler = self._handlers.get(method)
        if handler is None:
            found = (service.service(details) for service in self._services)
            bare = next((handler for handler in found if handler is not None), None)
            if bare is None:
                return None
            handler = self._handlers[method] = self._contained(method, bare)
        return handler

    def _contained(self, method: str, handler: Any) -> Any:
        behavior = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        parse = None
        deserializer = handler.request_deserializer
        if not handler.request_streaming:
            parse, deserializer = deserializer, None
        guard = self._generator if inspect.isasyncgenfunction(behavior) else self._call
        return _MAKERS[handler.request_streaming, handler.response_streaming](
            guard(behavior, method, parse),
            request_deserializer=deserializer,
            response_serializer=handler.response_serializer,
        )

    def _call(self, behavior: Any, method: str, parse: Any) -> Any:
        async def call(request: Any, context: Any) -> Any:
            self._open += 1
            try:
                self._check_open(method)
                return await behavior(_parsed(parse, request), context)
            except Exception as error:  # noqa: BLE001  the last line of defence
                await _end(context, method, error)
            finally:
                self._open -= 1

        return call

    def _generator(self, behavior: Any, method: str, parse: Any) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            self._open += 1
            try:
                self._check_open(method)
                async for message in behavior(_parsed(parse, request), context):
                    yield message
            except Exception as error:  # noqa: BLE001  the last line of defence
                await _end(context, method, error)
            finally:
                self._open -= 1

        return call

    def _check_open(self, method: str) -> None:
        if self._open > self._max_open and not method.startswith(OPEN_METHODS):
            text = f"{self._max_open} calls are open, no more are taken"
            raise ResourceExhausted(text, BUSY_RETRY_S)


_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _parsed(parse: Callable[[bytes], Any] | None, request: Any) -> Any:
    if parse is None:
        return request
    try:
        return parse(request)
    except DecodeError:
        raise InvalidArgument.of("request", "these bytes are not a message of this call") from None


async def _end(context: Any, method: str, error: Exception) -> NoReturn:
    """End the call with the status of what was raised."""
    if isinstance(error, PhalanxError):
        await abort(context, error)
    if not isinstance(error, grpc.aio.AbortError):
        await contain(context, method, error)
    raise error


def _refusing(error: PhalanxError) -> Any:
    async def refuse(_requests: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
