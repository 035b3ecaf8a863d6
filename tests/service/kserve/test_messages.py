"""The messages themselves: typed contents, malformed bytes, and other software's of the same names."""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from phalanx.controller.model import ServedModel
from phalanx.controller.server.interceptors import Containment
from phalanx.controller.server.kserve import OpenInferenceService
from phalanx.protos.kserve import open_inference_pb2 as pb
from phalanx.protos.kserve import open_inference_pb2_grpc
from phalanx.protos.limits import MAX_MESSAGE_BYTES

PATH = "/inference.GRPCInferenceService/"


def typed(**given: Any) -> pb.ModelInferRequest:
    """A request whose tensors are in typed contents."""
    request = pb.ModelInferRequest(model_name="tiny", id="a")
    for name, value in given.items():
        tensor = request.inputs.add(name=name, shape=[1])
        if isinstance(value, bool):
            tensor.datatype = "BOOL"
            tensor.contents.bool_contents.append(value)
        else:
            tensor.datatype = "BYTES"
            tensor.contents.bytes_contents.append(value)
    return request


def raw(*contents: bytes, **datatypes: str) -> pb.ModelInferRequest:
    """A request whose tensors are in raw contents."""
    request = pb.ModelInferRequest(model_name="tiny", raw_input_contents=contents)
    for name, datatype in datatypes.items():
        request.inputs.add(name=name, datatype=datatype, shape=[1])
    return request


@pytest.fixture
def infer(serve: Any, say: Any, words: list[int]) -> Any:
    """One ModelInfer by the generated stub."""

    def run(request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        async def main() -> Any:
            async with (
                serve(say(words)) as served,
                grpc.aio.insecure_channel(served.address) as channel,
            ):
                stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                return await stub.ModelInfer(request, timeout=20)

        return asyncio.run(main())

    return run


def test_typed_contents_are_answered_in_kind(
    infer: Any, words: list[int], served_model: ServedModel
) -> None:
    request = typed(
        text_input=b"the fox",
        sampling_parameters=b'{"n": 2, "max_tokens": 3}',
        exclude_input_in_output=True,
        return_num_output_tokens=True,
        return_cumulative_logprob=False,
    )
    response = infer(request)
    text, counts = response.outputs
    assert (text.name, text.datatype, list(text.shape)) == ("text_output", "BYTES", [2])
    said = served_model.tokenizer.decode(words[:3]).encode()
    assert list(text.contents.bytes_contents) == [said, said]
    assert (counts.name, list(counts.contents.uint_contents)) == ("num_output_tokens", [3, 3])
    assert not response.raw_output_contents


def test_raw_contents_are_answered_in_kind(
    infer: Any, words: list[int], served_model: ServedModel
) -> None:
    response = infer(
        raw(b"\7\0\0\0the fox", b"\1", text_input="BYTES", exclude_input_in_output="BOOL")
    )
    said = served_model.tokenizer.decode(words).encode()
    assert list(response.raw_output_contents) == [struct.pack("<I", len(said)) + said]
    assert not response.outputs[0].HasField("contents")


def wrong() -> Iterator[tuple[pb.ModelInferRequest, str]]:
    """Requests and how the answer begins."""
    for contents in (b"", b"\1\0\0", b"\3\0\0\0ab", b"\1\0\0\0ab", b"\xff\xff\xff\xffab"):
        size = len(contents)
        yield raw(contents, text_input="BYTES"), f"text_input: {size} bytes of raw contents"
    for contents in (b"", b"\2", b"\1\1"):
        request = raw(b"\1\0\0\0a", contents, text_input="BYTES", stream="BOOL")
        yield request, f"stream: {len(contents)} bytes of raw contents, one byte of 0 or 1"
    yield raw(b"", b"", text_input="BYTES"), "raw_input_contents: 2 entries for 1 inputs"
    request = typed(text_input=b"a")
    request.raw_input_contents.append(b"\1\0\0\0a")
    yield request, "text_input: has contents beside raw_input_contents"
    request = typed(text_input=b"a")
    request.inputs[0].contents.bytes_contents.append(b"b")
    yield request, "text_input: 2 elements in bytes_contents, 1 allowed"
    request = typed(text_input=b"a")
    request.inputs[0].contents.int_contents.append(1)
    yield request, "text_input: has int_contents, bytes_contents allowed"
    request = typed(text_input=b"a")
    request.inputs[0].ClearField("contents")
    yield request, "text_input: 0 elements in bytes_contents, 1 allowed"
    request = typed(text_input=b"a")
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    yield request, "text_input: parameters 'shared_memory_region', none allowed"
    request = typed(text_input=b"a")
    request.parameters["timeout"].string_param = "soon"
    yield request, "parameters.timeout: 'soon' is not a number of microseconds"
    request = typed(text_input=b"a")
    request.MergeFromString(b"\xf8\x07\x01")
    yield request, "request: field number 127 is not known here"


@pytest.mark.parametrize(("request_", "told"), list(wrong()))
def test_wrong_contents_are_named(infer: Any, request_: Any, told: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        infer(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(told)


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ServerReady"])
def test_bytes_that_are_no_message(serve: Any, say: Any, method: str) -> None:
    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            for data in (b"\xff\xff", b"\x0a\xff"):
                call = channel.stream_stream(PATH + method)(iter([data]), timeout=20)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await anext(aiter(call))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(main())


def test_a_caller_that_does_not_read_its_stream_is_let_go(
    serve: Any, words: list[int], eventually: Any
) -> None:
    """All its requests are freed, and it is told why when it reads again."""

    async def script(submission: Any) -> AsyncIterator[Any]:
        first = 0
        while True:
            await asyncio.sleep(0)
            yield [submission.event(words * 20, first)]
            first += 20 * len(words)

    async def main() -> None:
        async with serve(script) as served:
            server, calls = grpc.aio.server(), Containment()
            front = OpenInferenceService(served.service, lambda: True, max_stall_s=0.2)
            add: Any = open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
            add(front, calls)
            server.add_generic_rpc_handlers((calls,))
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            narrow = [("grpc.http2.bdp_probe", 0)]  # a window that is soon full
            target = f"127.0.0.1:{port}"
            async with grpc.aio.insecure_channel(target, options=narrow) as channel:
                stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                call = stub.ModelStreamInfer(timeout=30)
                for _ in range(2):
                    await call.write(typed(text_input=b"a", stream=True))
                await eventually(lambda: len(served.engine.submissions) == 2)
                await eventually(lambda: not served.engine.live)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call:
                        pass
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await server.stop(None)

    asyncio.run(main())


CALLER = """
import sys, time, grpc
from phalanx.protos.kserve import open_inference_pb2_grpc, open_inference_pb2 as pb
def requests():
    for _ in range(3):
        yield pb.ModelInferRequest.FromString(bytes.fromhex(sys.argv[2]))
    time.sleep(60)
stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
for answer in stub.ModelStreamInfer(requests()):
    pass
"""


def test_a_caller_that_dies_frees_its_requests(
    serve: Any, words: list[int], eventually: Any
) -> None:
    async def script(submission: Any) -> AsyncIterator[Any]:
        yield [submission.event(words[:1], 0)]
        await asyncio.Event().wait()

    async def main() -> None:
        request = typed(text_input=b"a", stream=True).SerializeToString().hex()
        async with serve(script) as served:
            command = (sys.executable, "-P", "-c", CALLER, served.address, request)
            caller = await asyncio.create_subprocess_exec(*command)
            try:
                await eventually(lambda: len(served.engine.live) == 3)
            finally:
                caller.kill()
                await caller.wait()
            await eventually(lambda: not served.engine.live)

    asyncio.run(main())


def test_a_message_past_the_limit_ends_the_call_with_a_status(
    serve: Any, say: Any, words: list[int]
) -> None:
    async def main() -> None:
        async with (
            serve(say(words)) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            stub: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
            large = typed(text_input=b"a" * MAX_MESSAGE_BYTES)
            for call in (stub.ModelInfer(large), stub.ModelStreamInfer(iter([large]))):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call if hasattr(call, "read") else _one(call):
                        pass
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await stub.ModelInfer(typed(text_input=b"a"))

    asyncio.run(main())


async def _one(call: Any) -> AsyncIterator[Any]:
    yield await call


def test_health_and_reflection_know_the_service(serve: Any, say: Any) -> None:
    name = "inference.GRPCInferenceService"

    async def main() -> None:
        async with serve(say([50]), reflection=True) as served:
            served.host.set_serving(True)
            async with grpc.aio.insecure_channel(served.address) as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                state = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert state.status == health_pb2.HealthCheckResponse.SERVING
                stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
                ask = reflection_pb2.ServerReflectionRequest
                symbols = (name, "phalanx.v1.InferenceService", "inference.ModelInferRequest")
                questions = [ask(file_containing_symbol=symbol) for symbol in symbols]
                answers = [answer async for answer in stub.ServerReflectionInfo(iter(questions))]
                nothing = ask(file_containing_symbol="inference.Nothing")
                async for answer in stub.ServerReflectionInfo(iter([nothing])):
                    assert answer.error_response.error_code == 5
        for answer in answers:
            files = [
                descriptor_pb2.FileDescriptorProto.FromString(data)
                for data in answer.file_descriptor_response.file_descriptor_proto
            ]
            assert {file.package for file in files} <= {"inference", "phalanx.v1"} and files

    asyncio.run(main())


@pytest.mark.parametrize("order", [("ours", "theirs"), ("theirs", "ours")])
def test_both_live_in_one_process(triton: Any, order: tuple[str, str]) -> None:
    """Triton's messages have our messages' names; whoever is imported first."""
    modules = {
        "ours": "from phalanx.protos.kserve import open_inference_pb2 as ours",
        "theirs": "from tritonclient.grpc import service_pb2 as theirs",
    }
    script = (
        f"{modules[order[0]]}\n{modules[order[1]]}\n"
        "data = theirs.ModelInferRequest(model_name='a', raw_input_contents=[b'b'])\n"
        "same = ours.ModelInferRequest.FromString(data.SerializeToString())\n"
        "print(same.model_name, same.raw_input_contents, type(same) is type(data))\n"
    )
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("a [b'b'] False\n", 0), done.stderr


def test_names_and_numbers_are_tritons(triton: Any) -> None:
    """Each of our fields is there in Triton's message of the same name, as the same thing."""
    from tritonclient.grpc import model_config_pb2, service_pb2

    theirs = service_pb2.DESCRIPTOR.pool
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        compare(message, theirs.FindMessageTypeByName(message.full_name))
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            other = theirs.FindMethodByName(method.full_name)
            for side in ("input_type", "output_type"):
                assert getattr(method, side).full_name == getattr(other, side).full_name
            assert method.client_streaming == other.client_streaming
            assert method.server_streaming == other.server_streaming
    ours = dict(pb.DataType.items())
    assert ours.items() <= dict(model_config_pb2.DataType.items()).items()


def compare(ours: Any, theirs: Any) -> None:
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        for fact in ("number", "type", "is_repeated", "has_presence"):
            assert getattr(field, fact) == getattr(other, fact), field.full_name
    for nested in ours.nested_types:
        compare(nested, theirs.nested_types_by_name[nested.name])
