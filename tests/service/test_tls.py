"""TLS and mutual TLS, and the addresses that need them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phalanx.controller.client import AsyncClient, Client
from phalanx.protos.errors import ConfigError, Unauthenticated, Unavailable


def tls(certificates: Any, **more: str) -> dict[str, str]:
    return {
        "tls_cert": certificates.path("server.pem"),
        "tls_key": certificates.path("server.key"),
        **more,
    }


def test_tls(serve: Any, say: Any, certificates: Any) -> None:
    async def main() -> None:
        trusted = {"root_certificates": certificates.read("ca.pem")}
        async with serve(say([50]), client=trusted, **tls(certificates)) as served:
            await served.client.complete("a")
            await served.client.ask("a")
            for wrong in ({}, {"root_certificates": certificates.read("other.pem")}):
                async with AsyncClient(served.address, timeout=5, **wrong) as client:
                    with pytest.raises(Unavailable):
                        await client.model_info()

    asyncio.run(main())


def test_mutual_tls_and_the_tenant_of_a_certificate(
    serve: Any, say: Any, certificates: Any
) -> None:
    def own(name: str) -> dict[str, bytes]:
        return {
            "root_certificates": certificates.read("ca.pem"),
            "certificate": certificates.read(f"{name}.pem"),
            "private_key": certificates.read(f"{name}.key"),
        }

    async def main() -> None:
        options = tls(certificates, tls_client_ca=certificates.path("ca.pem"))
        async with serve(say([50]), client=own("alice"), **options) as served:
            await served.client.complete("a")
            assert served.engine.submissions[0].tenant == "alice"
            for wrong in (own("mallory"), {"root_certificates": certificates.read("ca.pem")}):
                async with AsyncClient(served.address, timeout=5, **wrong) as client:
                    with pytest.raises(Unavailable):
                        await client.model_info()
            assert len(served.engine.submissions) == 1

    asyncio.run(main())


def test_tls_and_a_token_together(serve: Any, say: Any, certificates: Any, token_file: str) -> None:
    async def main() -> None:
        trusted = {"root_certificates": certificates.read("ca.pem")}
        options = tls(certificates, token_file=token_file, host="0.0.0.0")
        async with serve(say([50]), **options) as served:
            address = served.address.replace("0.0.0.0", "127.0.0.1")
            async with AsyncClient(address, token="b", **trusted) as client:
                await client.complete("a")
            async with AsyncClient(address, **trusted) as client:
                with pytest.raises(Unauthenticated):
                    await client.model_info()

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_open_address_needs_tls_and_credentials(
    serve: Any, say: Any, certificates: Any, token_file: str, host: str
) -> None:
    async def refused(**options: Any) -> None:
        with pytest.raises(ConfigError, match="host is"):
            async with serve(say([50]), host=host, **options):
                pass

    async def main() -> None:
        await refused()
        await refused(token_file=token_file)
        await refused(**tls(certificates))

    asyncio.run(main())


def test_insecure_allows_an_open_address(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50]), host="0.0.0.0", insecure=True) as served:
            assert served.address.startswith("0.0.0.0:")

    asyncio.run(main())


@pytest.mark.parametrize(
    "files",
    [
        {"tls_cert": "server.pem", "tls_key": "alice.key"},
        {"tls_cert": "server.key", "tls_key": "server.key"},
        {"tls_cert": "server.pem", "tls_key": "nothing"},
        {"tls_cert": "server.pem"},
        {"tls_client_ca": "ca.pem"},
        {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "names"},
    ],
)
def test_bad_certificates_are_refused(
    serve: Any, say: Any, certificates: Any, files: dict[str, str]
) -> None:
    async def main() -> None:
        options = {field: certificates.path(name) for field, name in files.items()}
        with pytest.raises(ConfigError, match="tls_"):
            async with serve(say([50]), **options):
                pass

    asyncio.run(main())


def test_the_blocking_client_speaks_tls_with_a_token(
    serve: Any, say: Any, certificates: Any, token_file: str
) -> None:
    def work(address: str) -> str:
        with Client(address, token="b", root_certificates=certificates.read("ca.pem")) as client:
            return client.model_info().name

    async def main() -> None:
        options = tls(certificates, token_file=token_file)
        async with serve(say([50]), **options) as served:
            assert await asyncio.to_thread(work, served.address) == "tiny"

    asyncio.run(main())
