"""Files of tokens and certificates that change while the server runs, and expired ones."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from phalanx.controller.client import AsyncClient
from phalanx.controller.openai.host import OpenAIHost
from phalanx.controller.server.security import TokenFile
from phalanx.protos.errors import Unauthenticated, Unavailable


def line(tenant: str, token: str) -> str:
    return f"{tenant}:{hashlib.sha256(token.encode()).hexdigest()}\n"


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


def test_a_token_file_is_read_again(serve: Any, say: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(line("red", "old"))

    async def main() -> None:
        async with serve(say([50]), token_file=str(path), token="old", check_s=0.0) as served:
            await served.client.model_info()
            path.write_text(line("red", "new"))
            with pytest.raises(Unauthenticated):
                await served.client.model_info()
            async with AsyncClient(served.address, token="new") as client:
                await client.model_info()
                for broken in ("nonsense\n", ""):
                    path.write_text(broken)
                    await client.model_info()  # what was known holds
                path.unlink()
                await client.model_info()
                path.write_text(line("blue", "newest"))
                with pytest.raises(Unauthenticated):
                    await client.model_info()

    asyncio.run(main())


def test_files_are_not_looked_at_for_every_call(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(line("red", "old"))
    table = TokenFile(str(path), check_s=3600.0)
    path.write_text(line("red", "new"))
    assert table.caller(bearer("old")).tenant == "red"
    with pytest.raises(Unauthenticated):
        table.caller(bearer("new"))


@pytest.fixture
def issue(certificates: Any, tmp_path: Path) -> Callable[..., None]:
    """Factory: `issue("server", authority="other", days=-1)` puts name.pem and name.key into
    the test's folder."""
    shutil.copytree(certificates.folder, tmp_path, dirs_exist_ok=True)

    def make(name: str, *, authority: str = "ca", days: int = 1) -> None:
        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

        openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "request"),
        )
        openssl(
            *("x509", "-req", "-in", "request", "-days", str(days), "-extfile", "names"),
            *("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial"),
            *("-out", f"{name}.pem"),
        )

    return make


async def gets(address: str, authority: Path, **own: bytes) -> bool:
    """Whether a client that trusts this authority gets an answer over gRPC."""
    options: Any = {"root_certificates": authority.read_bytes(), "timeout": 5, **own}
    async with AsyncClient(address, **options) as client:
        try:
            await client.model_info()
        except Unavailable:
            return False
        return True


async def fetches(url: str, authority: Path) -> bool:
    """The same over HTTP."""
    async with httpx.AsyncClient(verify=str(authority), timeout=5) as client:
        try:
            return (await client.get(f"{url}/models")).status_code == 200
        except httpx.ConnectError:
            return False


def test_a_renewed_certificate_is_used_for_new_connections(
    serve: Any, say: Any, issue: Any, tmp_path: Path
) -> None:
    ca, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    files = {
        "tls_cert": str(tmp_path / "server.pem"),
        "tls_key": str(tmp_path / "server.key"),
        "check_s": 0.0,
    }

    async def both(address: str, url: str) -> list[tuple[bool, bool]]:
        return [(await gets(address, ca), await gets(address, other)),
                (await fetches(url, ca), await fetches(url, other))]  # fmt: skip

    async def main() -> None:
        trusted = {"root_certificates": ca.read_bytes()}
        async with serve(say([50]), client=trusted, **files) as served:
            await served.client.model_info()
            front = OpenAIHost(served.service, **files)
            await front.start()
            try:
                assert await both(served.address, front.url) == [(True, False)] * 2
                (tmp_path / "server.pem").write_text("half of it")
                assert await both(served.address, front.url) == [(True, False)] * 2
                issue("server", authority="other")
                assert await both(served.address, front.url) == [(False, True)] * 2
                await served.client.model_info()  # a connection that was there goes on
                issue("server", days=-1)
                assert await both(served.address, front.url) == [(False, False)] * 2
                issue("server")
                assert await both(served.address, front.url) == [(True, False)] * 2
            finally:
                await front.stop(0.0)

    asyncio.run(main())


def test_an_expired_client_certificate_is_refused(
    serve: Any, say: Any, issue: Any, tmp_path: Path
) -> None:
    names = {"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.pem"}
    files = {field: str(tmp_path / name) for field, name in names.items()}

    def own(name: str) -> dict[str, bytes]:
        return {
            "certificate": (tmp_path / f"{name}.pem").read_bytes(),
            "private_key": (tmp_path / f"{name}.key").read_bytes(),
        }

    async def main() -> None:
        ca = tmp_path / "ca.pem"
        issue("late", days=-1)
        async with serve(say([50]), **files, check_s=0.0) as served:
            assert await gets(served.address, ca, **own("alice"))
            assert not await gets(served.address, ca, **own("late"))
            assert not await gets(served.address, ca)
            assert not await gets(served.address, ca, **own("mallory"))
            shutil.copy(tmp_path / "other.pem", tmp_path / "ca.pem.new")
            shutil.copy(ca, tmp_path / "trusted.pem")
            (tmp_path / "ca.pem.new").replace(ca)  # another authority of callers from now on
            trusted = tmp_path / "trusted.pem"
            assert await gets(served.address, trusted, **own("mallory"))
            assert not await gets(served.address, trusted, **own("alice"))

    asyncio.run(main())
