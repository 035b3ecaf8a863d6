"""The probe's script against real servers: plain, TLS, mutual TLS, serving or not."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from phalanx.controller.server.health import HealthService
from phalanx.controller.server.security import TlsFiles, server_credentials

HEALTHY, UNHEALTHY, REFUSED = 0, 1, 2

Serve = Callable[..., int]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.crt, and tls.crt with tls.key for localhost, of both usages as the chart's has."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt")
    openssl("req", *key, "-subj", "/CN=server", "-keyout", "tls.key", "-out", "request")
    extensions = "subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n"
    (folder / "extensions").write_text(extensions)
    openssl(
        *("x509", "-req", "-in", "request", "-CA", "ca.crt", "-CAkey", "ca.key"),
        *("-CAcreateserial", "-extfile", "extensions", "-out", "tls.crt"),
    )
    return folder


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a health server on a thread; returns its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers: list[Any] = []

    async def start(serving: bool, credentials: grpc.ServerCredentials | None) -> int:
        server = grpc.aio.server()
        health = HealthService(())
        health.set_serving(serving)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        servers.append(server)
        return int(port)

    def run(*, serving: bool, credentials: grpc.ServerCredentials | None = None) -> int:
        return asyncio.run_coroutine_threadsafe(start(serving, credentials), loop).result(10)

    yield run
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def probe(deploy: Path, tmp_path: Path) -> Callable[..., int]:
    """Exit code of the script for a server on `port`."""

    def run(port: int, *arguments: str, host: str = "0.0.0.0", **fields: str) -> int:
        lines = ['model = "smollm2"', f'host = "{host}"', f"port = {port}", "insecure = true"]
        lines += [f'{name} = "{value}"' for name, value in fields.items()]
        file = tmp_path / "config.toml"
        file.write_text("\n".join(lines), encoding="utf-8")
        script = str(deploy / "healthcheck.py")
        return subprocess.run(
            [sys.executable, "-P", script, "--config", str(file), "--timeout", "3", *arguments],
            capture_output=True,
            check=False,
        ).returncode

    return run


def test_a_serving_server_is_healthy(serve: Serve, probe: Callable[..., int]) -> None:
    port = serve(serving=True)
    assert probe(port) == HEALTHY
    assert probe(port, host="127.0.0.1") == HEALTHY


def test_a_server_that_does_not_serve_is_alive_but_not_ready(
    serve: Serve, probe: Callable[..., int]
) -> None:
    port = serve(serving=False)
    assert probe(port) == UNHEALTHY
    assert probe(port, "--live") == HEALTHY


def test_nothing_there_is_neither(probe: Callable[..., int]) -> None:
    assert probe(1) == UNHEALTHY
    assert probe(1, "--live") == UNHEALTHY


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(serve: Serve, probe: Callable[..., int], certificates: Path, mutual: bool) -> None:
    """The files of the server's own configuration suffice; without them there is no answer."""
    files = {name: str(certificates / f"tls.{end}") for name, end in _ENDINGS.items()}
    authority = str(certificates / "ca.crt")
    credentials = server_credentials(
        TlsFiles(files["tls_cert"], files["tls_key"], authority if mutual else None)
    )
    port = serve(serving=True, credentials=credentials)
    if mutual:
        assert probe(port, **files, tls_client_ca=authority) == HEALTHY
    else:
        assert probe(port, "--ca", authority, **files) == HEALTHY
    assert probe(port, "--live") == UNHEALTHY
    wrong = ("--server-name", "elsewhere", "--ca", authority)
    assert probe(port, *wrong, **files) == UNHEALTHY


_ENDINGS = {"tls_cert": "crt", "tls_key": "key"}


def test_a_wrong_file_is_told(probe: Callable[..., int], tmp_path: Path) -> None:
    assert probe(70000) == REFUSED
    missing = str(tmp_path / "missing.pem")
    assert probe(50051, tls_cert=missing, tls_key=missing) == REFUSED
