"""What Triton's client is told of a wrong request: the status, the field, what is allowed."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from phalanx.controller.scheduling.request import FinishReason


@pytest.fixture
def refusal(serve: Any, say: Any, words: list[int], triton: Any) -> Any:
    """The error of one `infer`; a right request is answered after it, on the same connection."""

    def run(sent: list[Any], *, model: str = "tiny", **call: Any) -> tuple[str, str]:
        async def main() -> tuple[str, str]:
            async with (
                serve(say(words)) as served,
                triton.InferenceServerClient(served.address) as client,
            ):
                with pytest.raises(triton.InferenceServerException) as caught:
                    await client.infer(model, sent, **call)
                assert served.engine.submissions == []
                right = triton.InferInput("text_input", [1], "BYTES")
                right.set_data_from_numpy(np.array([b"a"], object))
                assert await client.infer("tiny", [right])
            return caught.value.status(), caught.value.message()

        return asyncio.run(main())

    return run


WRONG_PARAMETERS = [
    ("{", "sampling_parameters: is not JSON: "),
    (b"\xff", "sampling_parameters: is not JSON: "),
    ("[" * 60_000, "sampling_parameters: is not JSON"),
    ("9" * 60_000, "sampling_parameters: is not JSON"),
    (" " * 70_000, "sampling_parameters: 70000 bytes, at most 65536 allowed"),
    ("[1]", "sampling_parameters: [1] is not a JSON object"),
    ('{"n": 1, "n": 2}', "sampling_parameters: is not JSON: a key is given twice"),
    ('{"top_p": NaN}', "sampling_parameters: is not JSON: NaN"),
    ('{"best_of": 2}', "sampling_parameters: 'best_of' is not known here, allowed are bad_words,"),
    ('{"\\ud800": 2}', "sampling_parameters: '\\ud800' is not known here"),
    ('{"n": 1.5}', "sampling_parameters.n: 1.5 is not an integer in [0, 4294967295]"),
    ('{"n": true}', "sampling_parameters.n: true is not an integer"),
    ('{"n": 4000000000}', "sampling_parameters.n: 4000000000 is not an integer in [1, 8]"),
    ('{"max_tokens": -1}', "sampling_parameters.max_tokens: -1 is not an integer"),
    ('{"max_tokens": 0}', "sampling_parameters.max_tokens: 0 is not a positive integer"),
    ('{"max_tokens": "many"}', 'sampling_parameters.max_tokens: "many" is not an integer'),
    ('{"max_tokens": 999}', "sampling_parameters.max_tokens: 999 tokens after a prompt of"),
    ('{"top_k": -2}', "sampling_parameters.top_k: -2 is not an integer"),
    ('{"temperature": "hot"}', 'sampling_parameters.temperature: "hot" is not a number'),
    ('{"temperature": 1e999}', "sampling_parameters.temperature: inf is not a finite number"),
    ('{"ignore_eos": 1}', "sampling_parameters.ignore_eos: 1 is not true or false"),
    ('{"stop": [1]}', "sampling_parameters.stop: [1] is not a string or a list of strings"),
    ('{"stop": "\\ud800"}', "sampling_parameters.stop: holds a surrogate"),
    ('{"stop": ["a", ""]}', "sampling_parameters.stop[1]: 0 bytes"),
    ('{"stop_token_ids": ["x"]}', 'sampling_parameters.stop_token_ids: "x" is not an integer'),
    ('{"logit_bias": {"x": 1}}', 'sampling_parameters.logit_bias: "x" is not an integer'),
    ('{"logit_bias": {"1": 1, "01": 2}}', "sampling_parameters.logit_bias: a token id is given"),
    ('{"seed": 18446744073709551615}', "sampling_parameters.seed: 18446744073709551615 is not"),
]


@pytest.mark.parametrize(("value", "told"), WRONG_PARAMETERS, ids=range(len(WRONG_PARAMETERS)))
def test_wrong_parameters(refusal: Any, tensor: Any, value: str | bytes, told: str) -> None:
    sent = [tensor("text_input", "the fox"), tensor("sampling_parameters", value)]
    status, message = refusal(sent)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert message.startswith(told)
    assert len(message) < 1000


def test_wrong_tensors(refusal: Any, tensor: Any, inputs: Any) -> None:
    text = tensor("text_input", "the fox")
    cases = [
        ([], "text_input: is missing, a BYTES tensor of shape [1] is needed"),
        ([tensor("text_input", "")], "text_input: is empty, a text is allowed"),
        ([tensor("text_input", b"\xff")], "text_input: is not UTF-8: byte 0 is 0xff"),
        ([text, tensor("image", "x")], "inputs[1].name: 'image' is not one of text_input, stream,"),
        ([tensor("text_input", 7, datatype="INT64")], "text_input: datatype 'INT64', 'BYTES'"),
        ([tensor("text_input", "a", shape=[1, 1])], "text_input: shape [1, 1], [1] allowed"),
        ([text, text], "text_input: is given twice"),
        ([text, tensor("stream", "yes")], "stream: datatype 'BYTES', 'BOOL' allowed"),
        (inputs("a", stream=True), "stream: true is for ModelStreamInfer, false allowed"),
    ]
    for sent, told in cases:
        status, message = refusal(sent)
        assert (status, message[: len(told)]) == ("StatusCode.INVALID_ARGUMENT", told)


def test_wrong_calls(refusal: Any, inputs: Any, triton: Any) -> None:
    sent = inputs("a")
    output = triton.InferRequestedOutput
    shared = output("text_output")
    shared.set_shared_memory("region", 8)
    cases = [
        ({"outputs": [output("text")]}, "outputs[0].name: 'text' is not one of text_output,"),
        ({"outputs": [output("logprobs")]}, "outputs[0].name: 'logprobs' is made when the input"),
        ({"outputs": [shared]}, "outputs[0].parameters: 'shared_memory_byte_size, shared_memory_"),
        ({"outputs": [output("text_output")] * 2}, "outputs: an output is asked for twice"),
        ({"sequence_id": 3}, "parameters.sequence_id: is not offered"),
        ({"priority": 3}, "parameters.priority: is not offered"),
        ({"timeout": -3}, "parameters.timeout: -3 is not a number of microseconds"),
        ({"parameters": {"beams": 3}}, "parameters: 'beams' is not known here, allowed are"),
        ({"parameters": {"n": 9}}, "parameters.n: 9 is not an integer in [1, 8]"),
        ({"request_id": "x" * 129}, "id: 129 characters, at most 128 allowed"),
    ]
    for call, told in cases:
        status, message = refusal(sent, **call)
        assert (status, message[: len(told)]) == ("StatusCode.INVALID_ARGUMENT", told)


def test_parameters_in_two_places(refusal: Any, inputs: Any) -> None:
    _, message = refusal(inputs("a", n=1), parameters={"temperature": 0.5})
    assert message.startswith("parameters.temperature: is not known here; sampling parameters are")


def test_everything_wrong_is_told_at_once(refusal: Any, inputs: Any) -> None:
    _, message = refusal(inputs("", stream=True, n=0.5, beams=1), request_id="x" * 200)
    for field in ("id:", "stream:", "sampling_parameters.n:", "'beams'"):
        assert field in message


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ({"model": "other"}, "model 'other' is not served here, 'tiny' is"),
        ({"model_version": "2"}, "version '2' of 'tiny' is not served here, 1 is"),
    ],
)
def test_another_model(refusal: Any, inputs: Any, call: dict[str, str], told: str) -> None:
    assert refusal(inputs("a"), **call) == ("StatusCode.NOT_FOUND", told)


def test_a_passed_timeout(serve: Any, triton: Any, inputs: Any) -> None:
    """The request's own timeout is the engine's deadline, so what it raises comes back."""

    async def script(submission: Any) -> Any:
        yield [submission.event([], 0, finish=FinishReason.DEADLINE)]

    async def main() -> str:
        async with (
            serve(script) as served,
            triton.InferenceServerClient(served.address) as client,
        ):
            with pytest.raises(triton.InferenceServerException) as caught:
                await client.infer("tiny", inputs("a"), timeout=1_000)
        return str(caught.value)

    told = "[StatusCode.DEADLINE_EXCEEDED] the deadline passed after 0 tokens"
    assert asyncio.run(main()) == told
