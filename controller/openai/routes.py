"""The paths of the HTTP front, and what surrounds every request: who calls, and errors."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from phalanx.controller.server.answer import SLOW_RETRY_S, Response
from phalanx.controller.server.interceptors import logged_incident
from phalanx.controller.server.rights import DEFAULT_TENANT
from phalanx.controller.server.security import Keys
from phalanx.controller.server.service import INLINE_BYTES, InferenceService
from phalanx.controller.tracing.context import note_parent
from phalanx.protos.errors import (
    NotFound,
    PhalanxError,
    RequestFailed,
    ResourceExhausted,
)
from phalanx.protos.limits import MAX_CONCURRENT_CALLS, MAX_MESSAGE_BYTES

from .batches import Call, answer_all
from .errors import error_object, error_response, http_error
from .fields import parse_object
from .requests import Asked, read_chat, read_completion
from .shapes import ChatShape, CompletionShape, Shape

TRACE_HEADERS = ("traceparent", "tracestate")
OPEN_PATHS = ("/health",)
BODY_TIMEOUT_S = 60.0
LAST_WORDS_S = 1.0
REQUEST_ID = "X-Request-Id"
"""The header with the id that the request has in the cluster; gRPC's Abort takes it."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """Handlers around one service. `tokens`: who may call; None lets everyone."""

    def __init__(self, service: InferenceService, tokens: Keys | None) -> None:
        self._service, self._tokens = service, tokens
        self._model, self._created = service.model_name, int(time.time())
        self._open = 0
        self.serving = False
        """What `/health` says."""

    def application(self) -> web.Application:
        """All paths, ready to be run."""
        app = web.Application(middlewares=[self._surround], client_max_size=MAX_MESSAGE_BYTES)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._one_model)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.on_response_prepare.append(_sign)
        return app

    @web.middleware
    async def _surround(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever happens ends this request only, with a status and a JSON error."""
        self._open += 1
        note_parent((name, request.headers.get(name, "")) for name in TRACE_HEADERS)
        try:
            if self._open > MAX_CONCURRENT_CALLS:
                text = f"{MAX_CONCURRENT_CALLS} requests are open, no more are taken"
                raise ResourceExhausted(text, SLOW_RETRY_S)
            if request.path not in OPEN_PATHS:
                self._tenant(request)
            return await handler(request)
        except PhalanxError as error:
            return error_response(error)
        except web.HTTPRequestEntityTooLarge:
            return http_error(413, f"the body is larger than {MAX_MESSAGE_BYTES} bytes")
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            text = f"{request.method} is not allowed here, {allowed} is"
            return http_error(405, text, {"Allow": allowed})
        except web.HTTPNotFound:
            return http_error(404, f"{request.path[:80]!r}: there is no such path")
        except web.HTTPException as error:
            return http_error(error.status, error.reason)
        except Exception as error:  # noqa: BLE001  the last line of defence
            return http_error(500, logged_incident(request.path, error))
        finally:
            self._open -= 1

    def _tenant(self, request: web.Request) -> str:
        if self._tokens is not None:
            given = request.headers.getall("Authorization", [])
            return self._tokens.caller([("authorization", value) for value in given]).tenant
        certificate: Any = request.get_extra_info("peercert") or {}
        names = [
            value
            for part in certificate.get("subject", ())
            for _, value in (pair for pair in part if pair[0] == "commonName")
        ]
        return next(iter(names), DEFAULT_TENANT)

    # --- small answers ---

    async def _health(self, request: web.Request) -> web.Response:
        ready = self.serving and not self._service.draining
        return web.Response(status=200 if ready else 503)

    async def _models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model_object()]})

    async def _one_model(self, request: web.Request) -> web.Response:
        asked = request.match_info["model"]
        if asked != self._model:
            raise NotFound(f"model {asked[:80]!r} is not served here, {self._model!r} is")
        return _json(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "phalanx",
        }

    # --- completions ---

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(
            request, "cmpl", read_completion, self._service.generate, CompletionShape
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, "chatcmpl", read_chat, self._service.chat, ChatShape)

    async def _answer(
        self,
        request: web.Request,
        prefix: str,
        read: Callable[[dict[str, Any], str, str], Asked],
        call: Call,
        shape: type[Shape],
    ) -> web.StreamResponse:
        data = await _body(request)
        answer_id = f"{prefix}-{uuid.uuid4().hex}"

        def work() -> Asked:
            return read(parse_object(data), self._model, answer_id)

        # long ones on a thread, so that streams go on meanwhile
        asked = work() if len(data) <= INLINE_BYTES else await asyncio.to_thread(work)
        samples = asked.samples * len(asked.messages)
        made = shape(answer_id, self._model, samples=samples, scored=asked.scored)
        tenant = self._tenant(request)
        if not asked.stream:
            whole = _Whole(made)
            await answer_all(asked, call, whole, tenant)
            return _json(made.whole(), {REQUEST_ID: answer_id})
        stream = _Stream(request, made, answer_id, asked)
        return await _streamed(request, stream, answer_all(asked, call, stream, tenant))


async def _streamed(
    request: web.Request, stream: _Stream, answering: Awaitable[None]
) -> web.StreamResponse:
    """Run the call to its end. An error before the first chunk has a status of its own; a later
    one is the stream's last event."""
    try:
        await answering
        await stream.finish()
    except Exception as error:
        if not stream.begun:
            raise
        if not isinstance(error, PhalanxError):
            error = RequestFailed(logged_incident(request.path, error))
        await stream.fail(error)
    return stream.response


class _Whole:
    """Gathers an answer that is sent at once."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def time_remaining(self) -> float | None:
        return None

    async def write(self, message: Response) -> None:
        self._shape.add(message)


class _Stream:
    """Sends an answer as server-sent events."""

    def __init__(self, request: web.Request, shape: Shape, answer_id: str, asked: Asked) -> None:
        self._request, self._shape = request, shape
        self._with_usage, self._counting = asked.include_usage, asked.continuous_usage
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                REQUEST_ID: answer_id,
            }
        )
        self.begun = False

    def time_remaining(self) -> float | None:
        return None

    def admitted(self, prompt_tokens: int) -> None:
        self._shape.admitted(prompt_tokens)

    async def write(self, message: Response) -> None:
        chunks = self._shape.chunks(message, with_usage=self._with_usage, counting=self._counting)
        data = b"".join(_event(msgspec.json.encode(chunk)) for chunk in chunks)
        if data:
            await self._send(data)

    async def finish(self) -> None:
        """The events after the last piece."""
        usage = b""
        if self._with_usage:
            usage = _event(msgspec.json.encode(self._shape.usage_chunk()))
        await self._send(usage + _event(b"[DONE]"))
        await self.response.write_eof()

    async def fail(self, error: PhalanxError) -> None:
        """Say why the stream ends early, unless nobody reads; then cut the connection."""
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._send(_event(msgspec.json.encode(error_object(error))))
                await self.response.write_eof()
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()

    async def _send(self, data: bytes) -> None:
        try:
            if not self.begun:
                self.begun = True
                await self.response.prepare(self._request)
            await self.response.write(data)
        except ConnectionError:
            raise asyncio.CancelledError("the caller is gone") from None


async def _body(request: web.Request) -> bytes:
    """The body of a JSON request. Raises for other kinds, and for one that does not come."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(
            reason="the Content-Type of the body is not application/json"
        )
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise web.HTTPUnsupportedMediaType(reason="the body is compressed, which is not supported")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason="the body did not come in time") from None


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(value: dict[str, Any], headers: dict[str, str] | None = None) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, headers=headers, content_type="application/json")


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "phalanx"
