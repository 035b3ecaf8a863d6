"""Who may call the HTTP front, over what, and what /health tells."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import httpx
import openai
import pytest

from phalanx.controller.openai.host import OpenAIHost
from phalanx.protos.errors import ConfigError

TEXT: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 1}


def test_a_token_names_the_tenant(front: Any, say: Any, token_file: str) -> None:
    async def main() -> None:
        async with front(say([50]), token="r-2", token_file=token_file) as made:
            await made.client.completions.create(**TEXT)
            assert made.submissions[0].tenant == "red"
            with pytest.raises(openai.AuthenticationError) as caught:
                await made.client.with_options(api_key="wrong").completions.create(**TEXT)
            assert caught.value.code == "invalid_api_key"
            async with httpx.AsyncClient(base_url=made.host.url) as bare:
                for path in ("/models", "/nowhere", "/completions"):
                    answer = await bare.get(path)
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
                twice = [("Authorization", "Bearer b"), ("Authorization", "Bearer r-1")]
                assert (await bare.get("/models", headers=twice)).status_code == 401
                assert (await bare.get("/../health")).status_code == 503
            assert len(made.submissions) == 1

    asyncio.run(main())


def test_health_follows_the_cluster(front: Any, say: Any) -> None:
    async def main() -> None:
        async with front(say([50])) as made:
            codes = []
            for serving in (False, True, False, True):
                made.host.set_serving(serving)
                codes.append((await made.http.get("/../health")).status_code)
            assert codes == [503, 200, 503, 200]
            await made.served.service.drain(0)
            assert (await made.http.get("/../health")).status_code == 503
            with pytest.raises(openai.InternalServerError) as caught:
                await made.client.completions.create(**TEXT)
            assert caught.value.status_code == 503

    asyncio.run(main())


def tls(certificates: Any, **more: str) -> dict[str, str]:
    pair = {"tls_cert": certificates.path("server.pem"), "tls_key": certificates.path("server.key")}
    return pair | more


def trusting(certificates: Any, name: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates.path("ca.pem"))
    if name is not None:
        context.load_cert_chain(certificates.path(f"{name}.pem"), certificates.path(f"{name}.key"))
    return context


def test_tls(front: Any, say: Any, certificates: Any) -> None:
    async def main() -> None:
        verify = trusting(certificates)
        async with front(say([50]), verify=verify, **tls(certificates)) as made:
            assert made.host.url.startswith("https://127.0.0.1:")
            await made.client.completions.create(**TEXT)
            assert made.submissions[0].tenant == "default"
            async with httpx.AsyncClient(base_url=made.host.url) as stranger:
                with pytest.raises(httpx.ConnectError):
                    await stranger.get("/models")
            plain = made.host.url.replace("https", "http")
            async with httpx.AsyncClient(base_url=plain) as bare:
                with pytest.raises(httpx.HTTPError):
                    await bare.get("/models")

    asyncio.run(main())


def test_mutual_tls_names_the_tenant(front: Any, say: Any, certificates: Any) -> None:
    async def main() -> None:
        options = tls(certificates, tls_client_ca=certificates.path("ca.pem"))
        alice = trusting(certificates, "alice")
        async with front(say([50]), verify=alice, **options) as made:
            await made.client.completions.create(**TEXT)
            assert made.submissions[0].tenant == "alice"
            for verify in (trusting(certificates), trusting(certificates, "mallory")):
                async with httpx.AsyncClient(base_url=made.host.url, verify=verify) as other:
                    with pytest.raises(httpx.HTTPError):
                        await other.get("/models")

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_need_tls_and_a_token(
    serve: Any, say: Any, host: str, token_file: str, certificates: Any
) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            for options in ({}, {"token_file": token_file}, tls(certificates)):
                with pytest.raises(ConfigError, match="openai_host is"):
                    OpenAIHost(served.service, host=host, **options)
            OpenAIHost(served.service, host=host, insecure=True)
            OpenAIHost(served.service, host=host, token_file=token_file, **tls(certificates))

    asyncio.run(main())


def test_a_port_that_is_taken(front: Any, say: Any) -> None:
    async def main() -> None:
        async with front(say([50])) as made:
            port = int(made.host.url.rpartition(":")[2].partition("/")[0])
            with pytest.raises(ConfigError, match=f"openai_port {port}: cannot be bound"):
                await OpenAIHost(made.served.service, port=port).start()

    asyncio.run(main())
