"""What generic gRPC tools do: find the calls by reflection, and make them without our code."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


def call(address: str, service: str, name: str, body: dict[str, Any], token: str = "") -> list[Any]:
    """The answers as JSON objects, as `grpcurl -d BODY ADDRESS SERVICE/NAME` shows them."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        shown = grpc.intercept_channel(channel, _Signed(metadata))
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(shown))
        method = pool.FindServiceByName(service).FindMethodByName(name)
        asked = message_factory.GetMessageClass(method.input_type)
        answered = message_factory.GetMessageClass(method.output_type)
        request = json_format.ParseDict(body, asked())
        made = shown.unary_stream if method.server_streaming else shown.unary_unary
        answer = made(f"/{service}/{name}", asked.SerializeToString, answered.FromString)(
            request, timeout=30
        )
        found = list(answer) if method.server_streaming else [answer]
        return [json_format.MessageToDict(item) for item in found]


class _Signed(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor,
              grpc.StreamStreamClientInterceptor):  # fmt: skip
    """Puts metadata on every call."""

    def __init__(self, metadata: Any) -> None:
        self._metadata = metadata

    def _sign(self, proceed: Any, details: Any, request: Any) -> Any:
        return proceed(details._replace(metadata=self._metadata), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _sign


@pytest.mark.parametrize("token", ["", "b"])
def test_calls_found_by_reflection(
    serve: Any, say: Any, words: list[int], token_file: str, token: str
) -> None:
    options = {"token_file": token_file} if token else {}

    async def main() -> None:
        script = say(words[:4])
        async with serve(script, reflection=True, vllm_protocol=True, **options) as served:
            own, address = "phalanx.v1.InferenceService", served.address
            (info,) = await asyncio.to_thread(call, address, own, "GetModelInfo", {}, token)
            assert info["name"] == "tiny"
            body = {"messages": [{"role": "user", "content": "hi"}], "params": {"maxTokens": 4}}
            answers = await asyncio.to_thread(call, address, own, "Chat", body, token)
            assert "usage" in answers[-1]
            other = "inference.GRPCInferenceService"
            (live,) = await asyncio.to_thread(call, address, other, "ServerLive", {}, token)
            assert live["live"] is True
            engine = "vllm.grpc.engine.VllmEngine"
            asked = {"text": "hi", "samplingParams": {"maxTokens": 4}}
            (whole,) = await asyncio.to_thread(call, address, engine, "Generate", asked, token)
            assert whole["complete"]["outputIds"] == words[:4]
            if token:
                with pytest.raises(grpc.RpcError) as caught:
                    await asyncio.to_thread(call, address, own, "GetModelInfo", {}, "wrong")
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    pytest.importorskip("smg_grpc_proto")
    asyncio.run(main())


def test_a_health_probe_needs_nothing(serve: Any, say: Any, token_file: str) -> None:
    """For the server, and for each of its services by name."""

    async def main() -> None:
        async with serve(say([50]), token_file=token_file, vllm_protocol=True) as served:
            served.host.set_serving(True)
            async with grpc.aio.insecure_channel(served.address) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                for name in ("", "phalanx.v1.InferenceService", "vllm.grpc.engine.VllmEngine",
                             "inference.GRPCInferenceService"):  # fmt: skip
                    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING, name

    pytest.importorskip("smg_grpc_proto")
    asyncio.run(main())
