"""Triton's client against the server: one request, one answer."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from phalanx.controller.model import ServedModel
from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import SampledToken, TokenLogprob


@pytest.fixture
def ask(serve: Any, triton: Any, inputs: Any) -> Any:
    """Send one request by the client's `infer`; gives the result, and what the engine was asked."""

    def run(script: Any, text: str = "the fox", *, call: Any = None, **given: Any) -> Any:
        async def main() -> Any:
            async with (
                serve(script) as served,
                triton.InferenceServerClient(served.address) as client,
            ):
                result = await client.infer("tiny", inputs(text, **given), **(call or {}))
                return result, served.engine.submissions[0]

        return asyncio.run(main())

    return run


def texts(result: Any, name: str = "text_output") -> list[str]:
    return [item.decode() for item in result.as_numpy(name)]


@pytest.mark.parametrize(("exclude", "prompt"), [(None, "the fox"), (False, "the fox"), (True, "")])
def test_the_text_follows_the_prompt_unless_excluded(
    ask: Any, say: Any, words: list[int], served_model: ServedModel, exclude: Any, prompt: str
) -> None:
    given = {} if exclude is None else {"exclude_input_in_output": exclude}
    result, submission = ask(say(words), **given, call={"request_id": "my id/7"})
    said = served_model.tokenizer.decode(words)
    assert texts(result) == [prompt + said]
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "my id/7")
    assert [output.name for output in response.outputs] == ["text_output"]
    encoded = served_model.tokenizer.encode("the fox").ids
    assert submission.prompt_token_ids == list(encoded)


def test_parameters_reach_the_engine(ask: Any, say: Any, words: list[int]) -> None:
    given = {
        "max_tokens": 5,
        "min_tokens": 1,
        "temperature": 0.7,
        "top_k": -1,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "seed": 2**62,
        "stop": ["xyz"],
        "stop_token_ids": [3],
        "logit_bias": {"7": -2.5},
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": None,
    }
    _, submission = ask(say(words), **given)
    assert submission.params == SamplingParams(
        max_tokens=5,
        min_tokens=1,
        temperature=0.7,
        top_k=0,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        seed=2**62,
        stop=("xyz",),
        stop_token_ids=(3,),
        logit_bias={7: -2.5},
        ignore_eos=True,
        include_stop=True,
        skip_special_tokens=False,
    )


def test_values_may_be_strings_as_in_samples_of_the_backend(
    ask: Any, say: Any, words: list[int]
) -> None:
    given = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "3", "ignore_eos": "true"}
    _, submission = ask(say(words), **given, stop="xyz", seed="4")
    assert submission.params == SamplingParams(
        temperature=0.1, top_p=0.95, max_tokens=3, ignore_eos=True, stop=("xyz",), seed=4
    )


def test_parameters_of_the_request_serve_when_there_is_no_tensor(
    ask: Any, say: Any, words: list[int]
) -> None:
    call = {"parameters": {"max_tokens": 3, "temperature": 0.5, "ignore_eos": True, "seed": 1}}
    _, submission = ask(say(words), call=call)
    assert submission.params == SamplingParams(
        max_tokens=3, temperature=0.5, ignore_eos=True, seed=1
    )


def test_samples_are_elements(
    ask: Any, say: Any, words: list[int], served_model: ServedModel
) -> None:
    result, _ = ask(say(words[:4]), n=3, exclude_input_in_output=True)
    assert texts(result) == [served_model.tokenizer.decode(words[:4])] * 3


def test_returned_extras(ask: Any, say: Any, words: list[int], served_model: ServedModel) -> None:
    def scored(token: int, logprob: float) -> SampledToken:
        own = TokenLogprob(token_id=token, logprob=logprob, rank=2)
        best = TokenLogprob(token_id=words[9], logprob=-0.125, rank=1)
        return SampledToken(seq=0, token_id=token, logprob=own, top=(best,))

    script = say([scored(words[0], -1.5), scored(words[1], -0.25)], finish=FinishReason.STOP)
    names = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens")
    flags = {f"return_{name}": True for name in (*names, "num_output_tokens")}
    result, submission = ask(script, logprobs=1, **flags)
    assert submission.params.logprobs == 1
    assert texts(result, "finish_reason") == ["stop"]
    assert result.as_numpy("cumulative_logprob").tolist() == [-1.75]
    assert result.as_numpy("num_input_tokens").tolist() == [len(submission.prompt_token_ids)]
    assert result.as_numpy("num_output_tokens").tolist() == [2]
    (scores,) = map(json.loads, texts(result, "logprobs"))
    decode = served_model.tokenizer.decode
    assert scores == [
        {
            str(token): {"logprob": value, "rank": 2, "decoded_token": decode([token])},
            str(words[9]): {"logprob": -0.125, "rank": 1, "decoded_token": decode([words[9]])},
        }
        for token, value in ((words[0], -1.5), (words[1], -0.25))
    ]


def test_only_the_outputs_asked_for_come(ask: Any, say: Any, words: list[int], triton: Any) -> None:
    wanted = [triton.InferRequestedOutput("finish_reason")]
    result, _ = ask(say(words), return_finish_reason=True, call={"outputs": wanted})
    assert [output.name for output in result.get_response().outputs] == ["finish_reason"]


def test_the_clients_timeout_is_the_requests_deadline(ask: Any, say: Any, words: list[int]) -> None:
    before = time.monotonic()
    _, submission = ask(say(words), call={"timeout": 9_000_000})
    assert 8.9 < submission.deadline - before < 30
