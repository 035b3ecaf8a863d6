"""Who may restart replicas, and what may still be read while a server drains."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from phalanx.protos.errors import PermissionDenied, PhalanxError, Unauthenticated, Unavailable
from phalanx.protos.v1 import serving_pb2

METHOD = "/phalanx.v1.AdminService/RestartReplicas"


class Restarts:
    """Counts how often replicas are to be restarted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return 3


def unasked(replicas: int) -> int:
    raise AssertionError("nobody asked for another number of replicas")


@pytest.mark.parametrize(
    ("token", "refusal"), [("r-1", None), ("b", PermissionDenied), ("wrong", Unauthenticated)]
)
def test_operators_alone_restart_replicas_where_callers_are_known(
    serve: Any, say: Any, token_file: str, token: str, refusal: type[PhalanxError] | None
) -> None:
    async def main() -> None:
        restarts = Restarts()
        options = {
            "token_file": token_file,
            "operators": ("red",),
            "restart": restarts,
            "scale": unasked,
        }
        async with serve(say([50]), token=token, **options) as served:
            if refusal is None:
                assert await served.client.restart_replicas() == 3
            else:
                with pytest.raises(refusal):
                    await served.client.restart_replicas()
        assert restarts.count == (refusal is None)

    asyncio.run(main())


@pytest.mark.parametrize(("host", "allowed"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_without_callers_names_only_this_machine_may(
    serve: Any, say: Any, host: str, allowed: bool
) -> None:
    async def main() -> None:
        restarts = Restarts()
        async with serve(
            say([50]), host=host, insecure=True, restart=restarts, scale=unasked
        ) as served:
            if allowed:
                await served.client.restart_replicas()
            else:
                with pytest.raises(PermissionDenied):
                    await served.client.restart_replicas()
        assert restarts.count == allowed

    asyncio.run(main())


def test_fields_that_nobody_knows_are_refused(serve: Any, say: Any) -> None:
    async def main() -> None:
        restarts = Restarts()
        async with (
            serve(say([50]), restart=restarts, scale=unasked) as served,
            grpc.aio.insecure_channel(served.host.address) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(METHOD)(b"\x50\x01")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert restarts.count == 0

    asyncio.run(main())


def test_a_draining_server_refuses_what_is_new_and_resumes_what_it_has_accepted(
    serve: Any, say: Any, words: list[int]
) -> None:
    async def main() -> None:
        async with serve(say(words[:6])) as served:
            before = await served.client.complete("The quick", request_id="first", max_tokens=6)
            await served.service.drain(0.0)
            with pytest.raises(Unavailable) as caught:
                await served.client.complete("The quick", request_id="second", max_tokens=6)
            assert (caught.value.retry_after_s or 0) > 0
            again = await served.client.complete("The quick", request_id="first", max_tokens=6)
            assert again.token_ids == before.token_ids
            async with grpc.aio.insecure_channel(served.host.address) as channel:
                resume = channel.unary_stream(
                    "/phalanx.v1.InferenceService/Resume",
                    request_serializer=serving_pb2.ResumeRequest.SerializeToString,
                    response_deserializer=serving_pb2.ResumeResponse.FromString,
                )
                request = serving_pb2.ResumeRequest(request_id="first", next_index=[4])
                tokens = [
                    token
                    async for message in resume(request)
                    for sample in message.samples
                    for token in sample.token_ids
                ]
            assert tokens == list(before.token_ids[4:])
            with pytest.raises(PhalanxError):
                await served.client.complete("Other", request_id="first", max_tokens=6)

    asyncio.run(main())
