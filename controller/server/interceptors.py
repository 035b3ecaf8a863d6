"""What surrounds every call: parsing, errors to statuses, and who is calling."""

from __future__ import annotations

import contextlib
import inspect
import logging
import secrets
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from phalanx.controller.tracing.context import note_parent
from phalanx.protos.errors import InvalidArgument, PhalanxError
from phalanx.protos.status import encode

from .rights import check_right
from .security import Keys

OPEN_METHODS = "/grpc.health.v1.Health/"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

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


class Containment(grpc.aio.ServerInterceptor):
    """Outermost: whatever a handler raises ends its own call, with a proper status.

    Requests are parsed here, so that bytes that are no message are the caller's fault.
    """

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the handler."""
        note_parent(details.invocation_metadata or ())
        handler = await continuation(details)
        if handler is None:
            return None
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
        guard = _guarded_generator if inspect.isasyncgenfunction(behavior) else _guarded
        return _MAKERS[handler.request_streaming, handler.response_streaming](
            guard(behavior, details.method, parse),
            request_deserializer=deserializer,
            response_serializer=handler.response_serializer,
        )


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


@contextlib.asynccontextmanager
async def _contained(context: Any, method: str) -> AsyncIterator[None]:
    """Whatever is raised inside ends the call with its status."""
    try:
        yield
    except PhalanxError as error:
        await abort(context, error)
    except grpc.aio.AbortError:
        raise
    except Exception as error:  # noqa: BLE001  the last line of defence
        await contain(context, method, error)


def _guarded(behavior: Any, method: str, parse: Any) -> Any:
    async def call(request: Any, context: Any) -> Any:
        async with _contained(context, method):
            return await behavior(_parsed(parse, request), context)

    return call


def _guarded_generator(behavior: Any, method: str, parse: Any) -> Any:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        async with _contained(context, method):
            async for message in behavior(_parsed(parse, request), context):
                yield message

    return call


class Authentication(grpc.aio.ServerInterceptor):
    """Nothing but health checks is answered without a known bearer token, and nothing that its
    role may not call."""

    def __init__(self, tokens: Keys) -> None:
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Continuation, details: grpc.HandlerCallDetails
    ) -> Any:
        """Refuse before anything is read; also for methods that do not exist."""
        if details.method.startswith(OPEN_METHODS):
            return await continuation(details)
        try:
            check_right(details.method, self._tokens.caller(details.invocation_metadata))
        except PhalanxError as refused:
            return _refusing(refused)
        return await continuation(details)


def _refusing(error: PhalanxError) -> Any:
    async def refuse(_requests: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
