"""The vLLM engine's protocol, by its own messages: the same tokens, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zipfile
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.steps import SampledToken, TokenLogprob

pb = pytest.importorskip("smg_grpc_proto.generated.vllm_engine_pb2")
SERVICE = "vllm.grpc.engine.VllmEngine"
PROMPT = [60, 61, 62]


class Stub:
    """Calls of the protocol over a channel, with messages alone."""

    def __init__(self, channel: Any, token: str | None = None) -> None:
        self._channel = channel
        self._metadata = None if token is None else (("authorization", f"Bearer {token}"),)

    def call(self, name: str, request: Any, *, streams: bool = False) -> Any:
        method = pb.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name[name]
        make = self._channel.unary_stream if streams else self._channel.unary_unary
        reads = method.output_type._concrete_class.FromString
        made = make(f"/{SERVICE}/{name}", type(request).SerializeToString, reads)
        return made(request, metadata=self._metadata, timeout=30)

    async def generate(self, request: Any) -> list[Any]:
        return [item async for item in self.call("Generate", request, streams=True)]


@pytest.fixture
def asked(serve: Any) -> Any:
    """Run `use(stub, served)` against a server."""

    def run(script: Any, use: Any, *, token: str | None = None, **options: Any) -> None:
        async def main() -> None:
            async with (
                serve(script, vllm_protocol=True, **options) as served,
                grpc.aio.insecure_channel(served.address) as channel,
            ):
                await use(Stub(channel, token), served)

        asyncio.run(main())

    return run


def request(*, stream: bool = False, **params: Any) -> Any:
    return pb.GenerateRequest(
        request_id="one",
        tokenized=pb.TokenizedInput(input_ids=PROMPT),
        sampling_params=pb.SamplingParams(**params),
        stream=stream,
    )


def test_tokens_whole_and_in_a_stream(asked: Any, say: Any, words: list[int]) -> None:
    async def use(stub: Stub, served: Any) -> None:
        whole = await stub.generate(request(n=2, max_tokens=6))
        assert [item.complete.index for item in whole] == [0, 1]
        for item in whole:
            assert list(item.complete.output_ids) == words[:6]
            assert item.complete.finish_reason == "length"
            assert (item.complete.prompt_tokens, item.complete.completion_tokens) == (3, 6)
        stream = await stub.generate(request(stream=True, n=2, max_tokens=6))
        for index in (0, 1):
            chunks = [item.chunk for item in stream if item.HasField("chunk")]
            mine = [chunk for chunk in chunks if chunk.index == index]
            assert len(mine) >= 1
            assert [token for chunk in mine for token in chunk.token_ids] == words[:6]
            assert sum(chunk.completion_tokens for chunk in mine) == 6
        ends = [item.complete for item in stream if item.HasField("complete")]
        assert [end.index for end in ends] == [0, 1]
        assert [end.completion_tokens for end in ends] == [6, 6]
        assert served.engine.submissions[0].prompt_token_ids == PROMPT

    asked(say(words, step=2), use)


def test_parameters_arrive_and_absent_ones_take_defaults(asked: Any, say: Any) -> None:
    async def use(stub: Stub, served: Any) -> None:
        await stub.generate(request())
        await stub.generate(
            request(
                temperature=0.0, top_p=0.5, top_k=3, min_p=0.1, seed=7, max_tokens=4, min_tokens=2,
                frequency_penalty=0.5, presence_penalty=-0.5, repetition_penalty=1.5,
                stop_token_ids=[5], logit_bias={7: -1.5}, stop=["x"], regex="[a-z]+",
            )
        )  # fmt: skip
        plain, full = (item.params for item in served.engine.submissions)
        assert (plain.temperature, plain.top_p, plain.repetition_penalty, plain.n) == (1, 1, 1, 1)
        assert plain.max_tokens == 0
        assert (full.temperature, full.top_p, full.top_k, full.min_p) == (0.0, 0.5, 3, 0.1)
        assert (full.seed, full.max_tokens, full.min_tokens) == (7, 4, 2)
        assert (full.frequency_penalty, full.presence_penalty) == (0.5, -0.5)
        assert full.repetition_penalty == 1.5
        assert (full.stop_token_ids, full.logit_bias, full.stop) == ((5,), {7: -1.5}, ("x",))
        assert (full.grammar.kind, full.grammar.text) == ("regex", "[a-z]+")

    asked(say([50]), use)


def test_scores_and_what_ended_the_text(asked: Any, say: Any) -> None:
    scored = [
        SampledToken(
            seq=0,
            token_id=token,
            logprob=TokenLogprob(token_id=token, logprob=-0.5, rank=1),
            top=(TokenLogprob(token_id=token, logprob=-0.5, rank=1),),
        )
        for token in (50, 51, 0)
    ]

    async def use(stub: Stub, served: Any) -> None:
        (whole,) = await stub.generate(request(logprobs=1))
        scores = whole.complete.output_logprobs
        assert list(scores.token_ids) == [50, 51, 0]
        assert list(scores.token_logprobs) == [-0.5] * 3
        assert [list(item.token_ids) for item in scores.top_logprobs] == [[50], [51], [0]]
        assert whole.complete.finish_reason == "stop"
        assert whole.complete.matched_token_id == 0

    asked(say(scored, finish=FinishReason.STOP, stop_token=0), use)


BAD = [
    (request(temperature=float("nan")), "sampling_params.temperature"),
    (request(n=99), "sampling_params.n"),
    (request(logprobs=-1), "sampling_params.logprobs"),
    (request(logit_bias={-4: 1.0}), "sampling_params.logit_bias"),
    (request(structural_tag="{}"), "sampling_params.structural_tag"),
    (request(truncate_prompt_tokens=3), "sampling_params.truncate_prompt_tokens"),
    (request(json_schema='{"type": "nothing"}'), "sampling_params.grammar"),
    (request(json_schema="[" * 50_000), "sampling_params.grammar"),
    (pb.GenerateRequest(request_id="a b", text="x"), "request_id"),
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[10**9])), "tokenized.input_ids[0]"),
    (pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=[5] * 100)), "tokenized"),
    (pb.GenerateRequest(text="x", mm_inputs=pb.MultimodalInputs()), "mm_inputs"),
    (pb.GenerateRequest(text="x", media_refs=pb.MediaRefs()), "media_refs"),
    (pb.GenerateRequest(text="x", data_parallel_rank=3), "data_parallel_rank"),
    (pb.GenerateRequest(text="x", kv_transfer_params_json='{"a":1}'), "kv_transfer_params_json"),
    (pb.GenerateRequest.FromString(b"\xa2\x7d\x01x"), "request"),
]  # fmt: skip


def test_bad_requests_are_refused_and_the_server_lives(asked: Any, say: Any) -> None:
    async def use(stub: Stub, served: Any) -> None:
        for wrong, field in BAD:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.generate(wrong)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, field
            assert caught.value.details().startswith(f"{field}: "), caught.value.details()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.call("Embed", pb.EmbedRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert not served.engine.submissions
        await stub.generate(request())

    asked(say([50]), use)


def test_what_a_gateway_asks_before_it_begins(asked: Any, say: Any, served_model: Any) -> None:
    async def use(stub: Stub, served: Any) -> None:
        assert not (await stub.call("HealthCheck", pb.HealthCheckRequest())).healthy
        served.host.set_serving(True)
        assert (await stub.call("HealthCheck", pb.HealthCheckRequest())).healthy
        info = await stub.call("GetModelInfo", pb.GetModelInfoRequest())
        assert (info.served_model_name, info.is_generation) == ("tiny", True)
        assert (info.max_context_length, list(info.eos_token_ids)) == (64, [0])
        assert b"secret-path" not in info.SerializeToString()
        server = await stub.call("GetServerInfo", pb.GetServerInfoRequest())
        assert (server.server_type, server.active_requests) == ("vllm-grpc", 2)
        (load,) = (await stub.call("GetLoads", pb.GetLoadsRequest())).loads
        assert load.num_waiting_reqs == 2
        from smg_grpc_proto.generated import common_pb2

        chunks = stub.call("GetTokenizer", common_pb2.GetTokenizerRequest(), streams=True)
        parts = [part async for part in chunks]
        data = b"".join(part.data for part in parts)
        assert [part.sha256 for part in parts if part.sha256] == [hashlib.sha256(data).hexdigest()]
        files = zipfile.ZipFile(io.BytesIO(data))
        tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
        text = "the lazy dog"
        assert tokenizer.encode(text).ids == served_model.tokenizer.encode(text).ids
        config = json.loads(files.read("tokenizer_config.json"))
        assert config["chat_template"] == served_model.chat_template
        assert config["eos_token"] == "<|end|>"

    asked(say([50]), use)


def test_abort_and_a_caller_that_leaves(asked: Any, eventually: Any) -> None:
    async def endless(submission: Any) -> Any:
        first = 0
        while not submission.aborted.is_set():
            yield [submission.event([50], first)]
            first += 1
            await asyncio.sleep(0.002)
        yield [submission.event((), first, finish=FinishReason.ABORT)]

    async def use(stub: Stub, served: Any) -> None:
        call = stub.call("Generate", request(stream=True), streams=True)
        await call.read()
        await stub.call("Abort", pb.AbortRequest(request_ids=["one", "unknown"]))
        last = None
        while (item := await call.read()) is not grpc.aio.EOF:
            last = item
        assert last.complete.finish_reason == "abort"
        again = stub.call("Generate", request(stream=True), streams=True)
        await again.read()
        again.cancel()
        await eventually(lambda: not served.engine.live)

    asked(endless, use)


def test_the_same_tokens_are_needed(asked: Any, say: Any, token_file: str) -> None:
    async def with_one(stub: Stub, served: Any) -> None:
        await stub.generate(request())
        assert served.engine.submissions[0].tenant == "blue"

    async def without(stub: Stub, served: Any) -> None:
        for name, message in (("HealthCheck", pb.HealthCheckRequest()),
                              ("GetModelInfo", pb.GetModelInfoRequest())):  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.call(name, message)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.generate(request())
        assert not served.engine.submissions

    asked(say([50]), with_one, token="b", token_file=token_file)
    asked(say([50]), without, token="wrong", token_file=token_file)


def test_it_is_off_unless_asked_for(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with (
            serve(say([50])) as served,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Stub(channel).call("HealthCheck", pb.HealthCheckRequest())
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())
