"""The HTTP server around the paths: its address, its locks, its beginning and its end."""

from __future__ import annotations

import logging

from aiohttp import web

from phalanx.controller.server.listeners import Listener, authentication, encryption
from phalanx.controller.server.security import (
    Keys,
    TlsFiles,
    TokenFile,
    check_exposure,
    server_context,
)
from phalanx.controller.server.service import InferenceService
from phalanx.controller.server.watched import CHECK_S
from phalanx.protos.errors import ConfigError

from .routes import Routes

LAST_WORDS_S = 0.5


class OpenAIHost:
    """Serves `service` to OpenAI's clients on `host`:`port` (0 takes a free one).

    Locks and their rules are those of the gRPC server: with `token_file`, every path but /health
    needs a bearer token, which clients call the API key. Raises `ConfigError` for an address that
    other machines reach without both TLS and a token or certificate, unless `insecure`. Create and
    use it on one running event loop.
    """

    def __init__(
        self,
        service: InferenceService,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_client_ca: str | None = None,
        token_file: str | None = None,
        insecure: bool = False,
        check_s: float = CHECK_S,
    ) -> None:
        self._service, self._host, self._port = service, host.strip("[]"), port
        self._files = TlsFiles.of(tls_cert, tls_key, tls_client_ca)
        self._context = (
            None if self._files is None else server_context(self._files, check_s=check_s)
        )
        tokens: Keys | None = None if token_file is None else TokenFile(token_file, check_s=check_s)
        self._locked = tokens is not None
        known = tokens is not None or tls_client_ca is not None
        check_exposure(
            host,
            encrypted=self._context is not None,
            authenticated=known,
            insecure=insecure,
            field="openai_host",
        )
        self._routes = Routes(service, tokens)
        self._runner: web.AppRunner | None = None
        self.url = ""
        """Where clients find it, "http://host:port/v1", once started."""

    async def start(self) -> None:
        """Bind and answer; /health gives 503 until `set_serving(True)`.

        Raises `ConfigError` when the address cannot be bound.
        """
        runner = web.AppRunner(
            self._routes.application(),
            access_log=None,
            # the library would log the bytes of broken requests, and tokens may be among them
            logger=logging.Logger("silent", logging.CRITICAL + 1),  # noqa: LOG001  nobody else's
            handle_signals=False,
            handler_cancellation=True,  # a caller that leaves frees its KV at once
            auto_decompress=False,
            shutdown_timeout=LAST_WORDS_S,
        )
        await runner.setup()
        site = web.TCPSite(
            runner, self._host, self._port, ssl_context=self._context, reuse_port=False
        )
        shown = f"[{self._host}]" if ":" in self._host else self._host
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigError(
                f"openai_host {self._host!r}, openai_port {self._port}: cannot be bound: "
                f"{error.strerror}"
            ) from None
        self._runner = runner
        scheme = "http" if self._context is None else "https"
        self.url = f"{scheme}://{shown}:{runner.addresses[0][1]}/v1"

    @property
    def listener(self) -> Listener:
        """What listens here."""
        address = self.url.partition("//")[2].partition("/")[0]
        tls = encryption(self._files)
        return Listener(address, "HTTP: OpenAI", tls, authentication(self._locked, self._files))

    def set_serving(self, serving: bool) -> None:
        """What /health says. The other paths are not affected."""
        self._routes.serving = serving

    async def stop(self, grace_s: float = 30.0) -> None:
        """Refuse new requests, let running ones finish for `grace_s` seconds, end the rest with
        503, and close the port."""
        self._routes.serving = False
        await self._service.drain(grace_s)
        if self._runner is not None:
            await self._runner.cleanup()
