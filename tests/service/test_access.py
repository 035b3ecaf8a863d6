"""Who gets in, and what is open: tokens, health, reflection, the port."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from phalanx.controller.client import AsyncClient
from phalanx.controller.server.security import TokenTable
from phalanx.protos.errors import ConfigError, NotFound, Unauthenticated
from phalanx.protos.v1 import serving_pb2

METHODS = (
    "Generate",
    "Chat",
    "Tokenize",
    "Detokenize",
    "Abort",
    "GetModelInfo",
    "GetClusterState",
    "NoSuchMethod",
)


def line(tenant: str, token: str) -> str:
    return f"{tenant}:{hashlib.sha256(token.encode()).hexdigest()}\n"


async def status_of(channel: Any, path: str, authorization: str | None) -> grpc.StatusCode:
    metadata = () if authorization is None else (("authorization", authorization),)
    try:
        async for _ in channel.unary_stream(path)(b"", metadata=metadata, timeout=5):
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic r-1", "r-1", "Bearer r-1 ", "Bearer R-1",
     "Bearer " + "x" * 5000, "Bearer " + hashlib.sha256(b"r-1").hexdigest()],
)  # fmt: skip
def test_no_method_answers_without_a_known_token(
    serve: Any, say: Any, token_file: str, authorization: str | None
) -> None:
    async def main() -> None:
        async with serve(say([50]), token_file=token_file, reflection=True) as served:
            paths = [f"/phalanx.v1.InferenceService/{method}" for method in METHODS]
            paths += ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/", "/x/y"]
            async with grpc.aio.insecure_channel(served.address) as channel:
                for path in paths:
                    code = await status_of(channel, path, authorization)
                    assert code is grpc.StatusCode.UNAUTHENTICATED, path
            assert not served.engine.submissions
            assert not served.books.started

    asyncio.run(main())


def test_two_tokens_at_once_are_refused(serve: Any, say: Any, token_file: str) -> None:
    async def main() -> None:
        async with (
            serve(say([50]), token_file=token_file) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            metadata = (("authorization", "Bearer r-1"), ("authorization", "Bearer wrong"))
            call = channel.unary_unary("/phalanx.v1.InferenceService/GetModelInfo")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(main())


@pytest.mark.parametrize(("token", "tenant"), [("r-1", "red"), ("r-2", "red"), ("b", "blue")])
def test_a_token_names_its_tenant(
    serve: Any, say: Any, token_file: str, token: str, tenant: str
) -> None:
    async def main() -> None:
        async with serve(say([50]), token_file=token_file, token=token) as served:
            await served.client.complete("a")
            await served.client.model_info()
            assert served.engine.submissions[0].tenant == tenant

    asyncio.run(main())


def test_tenants_do_not_meet(serve: Any, token_file: str) -> None:
    """An id is the tenant's own: others cannot abort it, and may use it themselves."""

    async def endless(submission: Any) -> Any:
        first = 0
        while not submission.aborted.is_set():
            yield [submission.event([50], first)]
            first += 1
            await asyncio.sleep(0.002)

    async def main() -> None:
        async with (
            serve(endless, token_file=token_file, token="r-1") as served,
            AsyncClient(served.address, token="b") as blue,
        ):
            mine, theirs = (
                client.generate("a", request_id="same") for client in (served.client, blue)
            )
            await anext(mine)
            with pytest.raises(NotFound):
                await blue.abort("same")
            await anext(theirs)
            await blue.abort("same")
            red, other = served.engine.submissions
            assert other.aborted.is_set()
            assert not red.aborted.is_set()
            await mine.aclose()
            await theirs.aclose()

    asyncio.run(main())


def test_health_needs_no_token(serve: Any, say: Any, token_file: str) -> None:
    async def main() -> None:
        async with serve(say([50]), token_file=token_file) as served:
            assert not await served.client.healthy()
            served.host.set_serving(True)
            assert await served.client.healthy()
            with pytest.raises(Unauthenticated):
                await served.client.model_info()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no token"),
        ("# only words\n", "no token"),
        ("red:abc\n", "line 1"),
        (line("red", "x") + "blue\n", "line 2"),
        (line("a b", "x"), "line 1"),
        (line("red", "x") + line("blue", "x"), "line 2: the token is listed twice"),
    ],
)
def test_a_bad_token_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        TokenTable.read(str(path))
    assert "abc" not in str(caught.value)


def test_a_missing_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_file"):
        TokenTable.read(str(tmp_path / "nothing"))


def test_health_follows_the_server(serve: Any, say: Any) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING

    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            stub: Any = health_pb2_grpc.HealthStub(channel)
            name = "phalanx.v1.InferenceService"
            request = health_pb2.HealthCheckRequest(service=name)
            watch = stub.Watch(request)
            assert (await watch.read()).status == not_serving
            assert (await stub.Check(request)).status == not_serving
            served.host.set_serving(True)
            assert (await watch.read()).status == serving
            for known in ("", name):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=known))
                assert answer.status == serving
            served.host.set_serving(False)
            assert (await watch.read()).status == not_serving
            served.host.set_serving(True)
            assert (await watch.read()).status == serving
            unknown = health_pb2.HealthCheckRequest(service="other")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(unknown)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            unknown_status = (await stub.Watch(unknown).read()).status
            assert unknown_status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            await served.host.stop(1.0)
            assert (await watch.read()).status == not_serving
            assert await watch.read() is grpc.aio.EOF
            served.host.set_serving(True)

    asyncio.run(main())


def test_waiting_until_ready(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            waiting = asyncio.create_task(served.client.wait_ready(10))
            await asyncio.sleep(0.15)
            assert not waiting.done()
            served.host.set_serving(True)
            await waiting

    asyncio.run(main())


@pytest.mark.parametrize("reflection", [False, True])
def test_reflection_is_off_by_default(serve: Any, say: Any, reflection: bool) -> None:
    async def main() -> None:
        options = {"reflection": True} if reflection else {}
        async with (
            serve(say([50]), **options) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo()
            question = reflection_pb2.ServerReflectionRequest(list_services="")
            if not reflection:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.write(question)  # may go out before the refusal comes
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
                return
            await call.write(question)
            names = {item.name for item in (await call.read()).list_services_response.service}
            assert "phalanx.v1.InferenceService" in names
            call.cancel()

    asyncio.run(main())


def test_a_taken_port_is_an_error(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            port = int(served.address.rpartition(":")[2])
            with pytest.raises(ConfigError, match="cannot be bound"):
                async with serve(say([50]), port=port):
                    pass

    asyncio.run(main())


def test_errors_name_no_path(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            info = await served.client.model_info()
            assert b"secret-path" not in info.SerializeToString()
            request = serving_pb2.GetClusterStateRequest()
            state = await served.client._stub.GetClusterState(request)
            assert b"secret-path" not in state.SerializeToString()

    asyncio.run(main())
