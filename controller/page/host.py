"""The page's own listener: files, figures, and the OpenAI front below /api for its chat.

Nothing that the browser loads comes from elsewhere, and the policy that is sent along forbids it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from phalanx.controller.openai.errors import error_response, http_error
from phalanx.controller.openai.routes import Routes
from phalanx.controller.server.interceptors import logged_incident
from phalanx.controller.server.listeners import Listener, authentication, encryption
from phalanx.controller.server.security import (
    Keys,
    TlsFiles,
    TokenFile,
    check_exposure,
    server_context,
)
from phalanx.controller.server.service import InferenceService
from phalanx.controller.units import is_loopback
from phalanx.protos.errors import ConfigError, PhalanxError, ResourceExhausted
from phalanx.protos.v1 import serving_pb2

from .figures import Figures
from .files import File, read_files
from .state import Cluster, cluster_object

SAMPLE_S = 1.0
MAPS_S = 0.1
"""For step loops to renew their maps."""
MAX_WATCHERS = 32
LAST_WORDS_S = 0.5
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "phalanx",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PageHost:
    """Serves the page on `host`:`port` (0 takes a free one).

    Locks and their rules are those of the gRPC server. With `token_file`, the files are open and
    everything else needs a bearer token, which the page asks its user for. On a loopback address
    only requests for a loopback name are answered, so that no foreign site's name that resolves to
    this machine reaches it. Raises `ConfigError` for an address that other machines reach without
    both TLS and a token or certificate, unless `insecure`. Create and use it on one running event
    loop.
    """

    def __init__(
        self,
        service: InferenceService,
        cluster: Cluster,
        figures: Figures,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_client_ca: str | None = None,
        token_file: str | None = None,
        insecure: bool = False,
    ) -> None:
        self._service, self._cluster, self._figures = service, cluster, figures
        self._host, self._port = host.strip("[]"), port
        self._tls = TlsFiles.of(tls_cert, tls_key, tls_client_ca)
        self._context = None if self._tls is None else server_context(self._tls)
        self._tokens: Keys | None = None if token_file is None else TokenFile(token_file)
        check_exposure(
            host,
            encrypted=self._context is not None,
            authenticated=self._tokens is not None or tls_client_ca is not None,
            insecure=insecure,
            field="page",
        )
        self._files = read_files()
        self._watchers: set[asyncio.Event] = set()
        self._latest = b""
        self._sampling: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self.url = ""
        """Where browsers find it, once started."""

    @property
    def listener(self) -> Listener:
        """What listens here."""
        address = self.url.partition("//")[2].rstrip("/")
        auth = authentication(self._tokens is not None, self._tls)
        return Listener(address, "HTTP: page", encryption(self._tls), auth)

    def application(self) -> web.Application:
        """All paths, ready to be run."""
        app = web.Application(middlewares=[self._surround])
        for path in self._files:
            app.router.add_get(path, self._file)
        app.router.add_get("/state", self._state)
        app.router.add_get("/events", self._events)
        app.add_subapp("/api", Routes(self._service, self._tokens).application())
        app.on_response_prepare.append(_sign)
        return app

    async def start(self) -> None:
        """Bind, answer, and take a sample a second. Raises `ConfigError` when the address cannot
        be bound."""
        runner = web.AppRunner(
            self.application(),
            access_log=None,
            # the library would log the bytes of broken requests, and tokens may be among them
            logger=logging.Logger("silent", logging.CRITICAL + 1),  # noqa: LOG001  nobody else's
            handle_signals=False,
            handler_cancellation=True,
            auto_decompress=False,
            shutdown_timeout=LAST_WORDS_S,
        )
        await runner.setup()
        site = web.TCPSite(
            runner, self._host, self._port, ssl_context=self._context, reuse_port=False
        )
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(
                f"page {self._host}:{self._port}: cannot be bound: {error.strerror}"
            ) from None
        self._runner = runner
        scheme = "http" if self._context is None else "https"
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{shown}:{runner.addresses[0][1]}/"
        self._sampling = asyncio.create_task(self._sample())

    async def stop(self) -> None:
        """Close the port."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _surround(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever happens ends this request only."""
        try:
            name = request.url.host or ""
            if is_loopback(self._host) and not is_loopback(name):
                return http_error(421, f"{name[:80]!r} is not a name of this listener")
            return await handler(request)
        except PhalanxError as error:
            return error_response(error)
        except web.HTTPException as error:
            return http_error(error.status, error.reason)
        except Exception as error:  # noqa: BLE001  the last line of defence
            return http_error(500, logged_incident("page", error))

    # --- answers ---

    async def _file(self, request: web.Request) -> web.Response:
        file: File = self._files[request.path]
        headers = {"Cache-Control": "no-cache", "ETag": file.tag}
        if request.headers.get("If-None-Match") == file.tag:
            return web.Response(status=304, headers=headers)
        return web.Response(
            body=file.content, content_type=file.kind, charset="utf-8", headers=headers
        )

    async def _state(self, request: web.Request) -> web.Response:
        self._check(request)
        body = msgspec.json.encode(await self._state_object())
        headers = {"Cache-Control": "no-store"}
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """The state with all samples, then a sample and the cluster every second."""
        self._check(request)
        if len(self._watchers) >= MAX_WATCHERS:
            raise ResourceExhausted(f"{MAX_WATCHERS} pages watch, no more may", SAMPLE_S)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        news = asyncio.Event()
        self._watchers.add(news)
        try:
            with contextlib.suppress(ConnectionError):
                await response.prepare(request)
                await response.write(_event(msgspec.json.encode(await self._state_object())))
                while True:
                    await news.wait()
                    news.clear()
                    await response.write(_event(self._latest))
        finally:
            self._watchers.discard(news)
        return response

    def _check(self, request: web.Request) -> None:
        if self._tokens is not None:
            given = request.headers.getall("Authorization", [])
            self._tokens.caller([("authorization", value) for value in given])

    async def _state_object(self) -> dict[str, Any]:
        self._cluster.ask_block_maps()
        info = await self._service.GetModelInfo(serving_pb2.GetModelInfoRequest(), None)
        return {
            "model": {
                "name": info.name,
                "family": info.family,
                "dtype": info.dtype,
                "max_context": info.max_context,
                "chat": info.has_chat_template,
                "version": info.server_version,
            },
            "cluster": cluster_object(self._cluster),
            "samples": [dataclasses.asdict(item) for item in self._figures.samples],
        }

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S - MAPS_S)
            if self._watchers:
                self._cluster.ask_block_maps()
            await asyncio.sleep(MAPS_S)
            replicas = self._cluster.snapshot().replicas
            sample = self._figures.take(
                sum(item.running_requests for item in replicas),
                sum(item.waiting_requests for item in replicas),
            )
            if not self._watchers:
                continue
            self._latest = msgspec.json.encode(
                {"cluster": cluster_object(self._cluster), "sample": dataclasses.asdict(sample)}
            )
            for news in self._watchers:
                news.set()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def _sign(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
