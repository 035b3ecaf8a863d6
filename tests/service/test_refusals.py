"""Bad input: refused with every wrong field named, and without effect on anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.errors import InvalidArgument, ModelError, NotFound
from phalanx.protos.limits import MAX_TEXT_BYTES
from phalanx.protos.v1 import serving_pb2

NAN, INF = math.nan, math.inf
VOCABULARY = 328  # of the model in conftest.py
CONTEXT = 64

# (prompt, parameters, fields that must be named)
BAD: list[tuple[Any, dict[str, Any], set[str]]] = [
    ("", {}, {"text"}),
    ([], {}, {"token_ids"}),
    ([VOCABULARY], {}, {"token_ids.ids[0]"}),
    ([1, 2**32 - 1, 2], {}, {"token_ids.ids[1]"}),
    ([1] * CONTEXT, {}, {"token_ids"}),
    ([1] * 5000, {}, {"token_ids"}),
    ("word " * 4000, {}, {"text"}),
    ("x" * (MAX_TEXT_BYTES + 1), {}, {"text"}),
    ([1] * 60, {"max_tokens": 5}, {"params.max_tokens"}),
    ([1], {"max_tokens": 2**32 - 1}, {"params.max_tokens"}),
    ([1], {"max_tokens": 0}, {"params.max_tokens"}),
    ([1], {"min_tokens": CONTEXT}, {"params.min_tokens"}),
    ([1], {"min_tokens": 4, "max_tokens": 3}, {"params.min_tokens"}),
    ([1], {"temperature": NAN}, {"params.temperature"}),
    ([1], {"temperature": INF}, {"params.temperature"}),
    ([1], {"temperature": -0.1}, {"params.temperature"}),
    ([1], {"top_p": 0.0}, {"params.top_p"}),
    ([1], {"top_p": 1.5}, {"params.top_p"}),
    ([1], {"min_p": -INF}, {"params.min_p"}),
    ([1], {"repetition_penalty": 0.0}, {"params.repetition_penalty"}),
    ([1], {"presence_penalty": 2.5}, {"params.presence_penalty"}),
    ([1], {"frequency_penalty": NAN}, {"params.frequency_penalty"}),
    ([1], {"top_k": 2**32 - 1}, {"params.top_k"}),
    ([1], {"no_repeat_ngram_size": 65}, {"params.no_repeat_ngram_size"}),
    ([1], {"seed": 2**63}, {"params.seed"}),
    ([1], {"n": 0}, {"params.n"}),
    ([1], {"n": 9}, {"params.n"}),
    ([1], {"logprobs": 21}, {"params.logprobs"}),
    ([1], {"prompt_logprobs": 21}, {"params.prompt_logprobs"}),
    ([1], {"logit_bias": {VOCABULARY: 1.0}}, {"params.logit_bias"}),
    ([1], {"logit_bias": {1: NAN}}, {"params.logit_bias[1]"}),
    ([1], {"logit_bias": {1: 101.0}}, {"params.logit_bias[1]"}),
    ([1], {"logit_bias": dict.fromkeys(range(301), 0.5)}, {"params.logit_bias"}),
    ([1], {"stop": [""]}, {"params.stop[0]"}),
    ([1], {"stop": ["a", "b" * 65]}, {"params.stop[1]"}),
    ([1], {"stop": ["a"] * 5}, {"params.stop"}),
    ([1], {"stop_token_ids": [VOCABULARY]}, {"params.stop_token_ids[0]"}),
    ([1], {"stop_token_ids": [1] * 65}, {"params.stop_token_ids"}),
    ([1], {"bad_words": [" "]}, {"params.bad_words[0]"}),
    ([1], {"bad_words": ["q" * 40]}, {"params.bad_words[0]"}),
    ([1], {"bad_words": ["q" * 1_000_000]}, {"params.bad_words[0]"}),
    ([1], {"bad_words": ["q"] * 65}, {"params.bad_words"}),
    ([1], {"request_id": "a b"}, {"request_id"}),
    ([1], {"request_id": "x" * 129}, {"request_id"}),
    ([1], {"request_id": "naïve\n"}, {"request_id"}),
    (
        [VOCABULARY],
        {"temperature": NAN, "n": 99, "stop": [""], "request_id": "/", "max_tokens": 0},
        {
            "token_ids.ids[0]",
            "params.temperature",
            "params.n",
            "params.stop[0]",
            "request_id",
            "params.max_tokens",
        },
    ),
]
BAD_TALKS: list[tuple[list[dict[str, str]], set[str]]] = [
    ([], {"messages"}),
    ([{"role": "user", "content": "x"}] * 1025, {"messages"}),
    ([{"role": "user", "content": ""}], {"messages[0].content"}),
    ([{"role": "root", "content": "x"}], {"messages[0].role"}),
    ([{"content": "x"}, {"role": "user"}], {"messages[0].role", "messages[1].content"}),
    ([{"role": "user", "content": "word " * 4000}], {"messages"}),
    ([{"role": "user", "content": "x" * (MAX_TEXT_BYTES + 1)}], {"messages"}),
]


def steady(words: list[int]) -> Any:
    """The request named "background" is answered slowly, every other one at once."""

    async def script(submission: Any) -> AsyncIterator[list[Any]]:
        for first, token in enumerate(words):
            if submission.request_id == "background":
                await asyncio.sleep(0.005)
            last = {"finish": FinishReason.LENGTH} if first + 1 == len(words) else {}
            yield [submission.event([token], first, **last)]

    return script


@contextlib.asynccontextmanager
async def beside_a_stream(serve: Any, words: list[int], text: str) -> AsyncIterator[Any]:
    """A server, and a stream on it that must end whole, whatever happens in the body."""
    said = words * 8
    async with serve(steady(said)) as served:
        background = asyncio.create_task(
            served.client.complete([3], request_id="background", max_tokens=CONTEXT - 1)
        )
        while not served.engine.submissions:
            await asyncio.sleep(0.005)
        yield served
        answer = await background
        assert answer.text == text
        assert list(answer.token_ids) == said


def test_every_bad_request_names_its_fields(
    serve: Any, words: list[int], served_model: Any
) -> None:
    async def main() -> None:
        text = served_model.tokenizer.decode(words * 8)
        async with beside_a_stream(serve, words, text) as served:
            for prompt, params, fields in BAD:
                with pytest.raises(InvalidArgument) as caught:
                    await served.client.complete(prompt, **params)
                named = {violation.field for violation in caught.value.violations}
                assert named == fields, (params, caught.value)
            for talk, fields in BAD_TALKS:
                with pytest.raises(InvalidArgument) as caught:
                    await served.client.ask(talk)
                assert {violation.field for violation in caught.value.violations} == fields
            assert len(served.engine.submissions) == 1
            ended = [outcome for outcome, *_ in served.books.ended]
            assert ended == ["invalid_argument"] * (len(BAD) + len(BAD_TALKS))

    asyncio.run(main())


def test_violations_say_the_value_and_what_is_allowed(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([5])) as served:
            with pytest.raises(InvalidArgument) as caught:
                await served.client.complete([1], temperature=11.0)
            (violation,) = caught.value.violations
            assert violation.description == "11.0 is not a finite number in [0, 10]"
            with pytest.raises(InvalidArgument) as caught:
                await served.client.complete([1] * 50, max_tokens=20)
            assert "20 tokens after a prompt of 50, at most 14 allowed" in str(caught.value)

    asyncio.run(main())


def test_violations_travel_as_standard_details(serve: Any, say: Any) -> None:
    """What any gRPC client finds, without this project's own client."""

    async def main() -> None:
        async with serve(say([5])) as served:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                request = serving_pb2.GenerateRequest(request_id="a b")
                async for _ in served.client._stub.Generate(request):
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            trailers = dict(caught.value.trailing_metadata())
            status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
            assert status.code == 3
            details = error_details_pb2.BadRequest()
            assert status.details[0].Unpack(details)
            assert [item.field for item in details.field_violations] == ["prompt", "request_id"]

    asyncio.run(main())


def test_more_violations_than_trailers_hold(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([5])) as served:
            with pytest.raises(InvalidArgument) as caught:
                await served.client.complete([1], logit_bias=dict.fromkeys(range(300), NAN))
            violations = caught.value.violations
            assert len(violations) > 10
            assert violations[-1].description.endswith("more violations")

    asyncio.run(main())


def test_unknown_fields_are_refused_at_any_depth(serve: Any, say: Any) -> None:
    extra = b"\x98\x06\x01"  # field 99, varint 1
    params = b"\x22" + bytes([len(extra)]) + extra
    requests = {
        "Generate": [(b"\x12\x01a" + extra, "request"), (b"\x12\x01a" + params, "params")],
        "Chat": [(b"\x12\x08\x0a\x04user" + b"\x12\x00" + extra, "request")],
        "Tokenize": [(b"\x0a\x01a" + extra, "request")],
        "Detokenize": [(extra, "request")],
        "Abort": [(b"\x0a\x01a" + extra, "request")],
        "GetModelInfo": [(extra, "request")],
        "GetClusterState": [(extra, "request")],
    }

    async def main() -> None:
        async with serve(say([5])) as served, grpc.aio.insecure_channel(served.address) as channel:
            for method, cases in requests.items():
                for data, field in cases:
                    call = channel.unary_stream(f"/phalanx.v1.InferenceService/{method}")
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        async for _ in call(data):
                            pass
                    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                    assert f"{field}: field number 99 is not known" in caught.value.details()

    asyncio.run(main())


def test_bad_calls_of_the_small_methods(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([5])) as served:
            client = served.client
            with pytest.raises(InvalidArgument, match="text: 1048577 bytes"):
                await client.tokenize("x" * (MAX_TEXT_BYTES + 1))
            with pytest.raises(InvalidArgument, match=r"token_ids\[1\]: 328 is not a token id"):
                await client.detokenize([0, VOCABULARY])
            with pytest.raises(InvalidArgument, match="token_ids: 262145 entries"):
                await client.detokenize([0] * (256 * 1024 + 1))
            with pytest.raises(InvalidArgument, match="request_id: is empty"):
                await client.abort("")
            with pytest.raises(NotFound):
                await client.abort("nobody")

    asyncio.run(main())


def test_chat_without_a_template(serve: Any, say: Any, served_model: Any) -> None:
    plain = dataclasses.replace(served_model, chat_template=None)

    async def main() -> None:
        async with serve(say([5]), model=plain) as served:
            with pytest.raises(ModelError, match="no chat template"):
                await served.client.ask("hi")
            assert not (await served.client.model_info()).has_chat_template
            await served.client.complete("hi")

    asyncio.run(main())


def test_what_a_template_raises_is_told(serve: Any, say: Any, served_model: Any) -> None:
    picky = "{% if messages|length > 1 %}{{ raise_exception('one message, please') }}{% endif %}x"
    model = dataclasses.replace(served_model, chat_template=picky)

    async def main() -> None:
        async with serve(say([5]), model=model) as served:
            await served.client.ask("hi")
            with pytest.raises(InvalidArgument) as caught:
                await served.client.ask([{"role": "user", "content": "x"}] * 2)
            (violation,) = caught.value.violations
            assert (violation.field, violation.description) == ("messages", "one message, please")

    asyncio.run(main())
