"""Roles: what a token's bearer may call, over every front; and what listens."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from phalanx.controller.client import AsyncClient
from phalanx.controller.metrics import Metrics
from phalanx.controller.openai.host import OpenAIHost
from phalanx.controller.server.rights import OWN, RIGHTS
from phalanx.controller.server.security import TokenTable
from phalanx.protos.errors import ConfigError, PermissionDenied
from phalanx.protos.v1 import admin_pb2, serving_pb2


def line(tenant: str, token: str, role: str = "") -> str:
    return f"{tenant}:{hashlib.sha256(token.encode()).hexdigest()}{role}\n"


@pytest.fixture
def roles(tmp_path: Path) -> str:
    path = tmp_path / "roles"
    path.write_text(
        line("red", "plain") + line("red", "user", ":user") + line("ops", "root", ":admin")
    )
    return str(path)


def test_every_call_has_a_role() -> None:
    """A call that is added must be given one; until then it is an administrator's."""
    services = (
        serving_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    )
    calls = {f"/{item.full_name}/{call.name}" for item in services for call in item.methods}
    assert calls == set(RIGHTS)


def test_a_user_may_not_call_what_is_for_administrators(serve: Any, say: Any, roles: str) -> None:
    async def main() -> None:
        async with serve(say([50]), token_file=roles) as served:
            for token in ("plain", "user"):
                async with AsyncClient(served.address, token=token) as client:
                    await client.complete("a")
                    await client.model_info()
                    with pytest.raises(PermissionDenied, match="GetClusterState"):
                        await client.cluster_state()
            async with AsyncClient(served.address, token="root") as client:
                await client.complete("a")
                assert (await client.cluster_state()).replicas
            async with grpc.aio.insecure_channel(served.address) as channel:
                for path in (OWN + "Drain", OWN + "getClusterState", OWN):
                    call = channel.unary_unary(path)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call(b"", metadata=(("authorization", "Bearer plain"),))
                    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, path
            assert [item.tenant for item in served.engine.submissions] == ["red", "red", "ops"]

    asyncio.run(main())


def test_without_tokens_whoever_reaches_the_server_may_all(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            assert (await served.client.cluster_state()).replicas

    asyncio.run(main())


@pytest.mark.parametrize("role", [":root", ":Admin", ":", ":admin:admin", "admin"])
def test_a_role_that_there_is_not_is_refused(tmp_path: Path, role: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(line("red", "x", role))
    with pytest.raises(ConfigError, match="line 1"):
        TokenTable.read(str(path))


def listening() -> set[int]:
    """Ports that this process listens on."""
    found = psutil.Process().net_connections("tcp")
    return {item.laddr.port for item in found if item.status == psutil.CONN_LISTEN}


def test_all_that_listens_is_told(serve: Any, say: Any, roles: str, certificates: Any) -> None:
    """As the operating system sees it; and none of it answers strangers, but for health."""
    locks = {
        "tls_cert": certificates.path("server.pem"),
        "tls_key": certificates.path("server.key"),
        "token_file": roles,
    }

    async def main() -> None:
        before = listening()
        trusted = {"root_certificates": certificates.read("ca.pem")}
        async with serve(say([50]), client=trusted, token="root", **locks) as served:
            front = OpenAIHost(served.service, **locks)
            await front.start()
            served.service.listeners += [served.host.listener, front.listener]
            try:
                told = (await served.client.cluster_state()).listeners
                ports = {int(item.address.rpartition(":")[2]) for item in told}
                assert listening() - before == ports
                assert {(item.tls, item.auth) for item in told} == {("on", "token")}
                assert all(item.address.startswith("127.0.0.1:") for item in told)
                async with httpx.AsyncClient(verify=certificates.path("ca.pem")) as http:
                    for path in ("models", "completions", "nothing", ""):
                        answer = await http.get(f"{front.url}/{path}")
                        assert answer.status_code == 401, path
            finally:
                await front.stop(0.0)

    asyncio.run(main())


def test_a_metrics_page_is_on_this_machine_alone() -> None:
    server = Metrics().serve("127.0.0.1", 0)
    try:
        port = int(server.address.rpartition(":")[2])
        found = psutil.Process().net_connections("tcp")
        assert {item.laddr.ip for item in found if item.laddr.port == port and
                item.status == psutil.CONN_LISTEN} == {"127.0.0.1"}  # fmt: skip
    finally:
        server.close()
