"""What OpenAI's client is given, whole and as a stream, and what reaches the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from phalanx.controller.scheduling.request import FinishReason
from phalanx.protos.sampling import Grammar, SamplingParams
from phalanx.protos.steps import SampledToken, TokenLogprob

USER = [{"role": "user", "content": "say it"}]


async def read(stream: Any) -> tuple[dict[int, str], dict[int, str], list[Any]]:
    """Texts and finish reasons by index, and all chunks."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
            if choice.finish_reason is not None:
                assert choice.index not in ends
                ends[choice.index] = choice.finish_reason
    return texts, ends, chunks


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 5},
        {"n": 3, "seed": 7},
        {"stop": ["lazy dog"]},
        {"stop": ["over", "ox j"], "n": 2},
    ],
)
def test_a_chat_is_the_same_through_both_fronts(
    front: Any, say: Any, words: list[int], params: dict[str, Any]
) -> None:
    async def main() -> None:
        async with front(say(words, step=2)) as made:
            ours = await made.served.client.ask(USER, **params)
            whole = await made.client.chat.completions.create(model="tiny", messages=USER, **params)
            stream = await made.client.chat.completions.create(
                model="tiny", messages=USER, stream=True, **params
            )
            texts, ends, chunks = await read(stream)
            wanted = [sample.text for sample in ours.samples]
            assert wanted[0]
            assert [choice.message.content for choice in whole.choices] == wanted
            assert [texts[index] for index in range(len(wanted))] == wanted
            reason = "stop" if "stop" in params else "length"
            assert {choice.finish_reason for choice in whole.choices} == {reason}
            assert set(ends.values()) == {reason}
            assert {chunk.id for chunk in chunks} == {chunks[0].id}
            first, second, third = made.submissions
            assert first.prompt_token_ids == second.prompt_token_ids == third.prompt_token_ids
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
                ours.usage.prompt_tokens,
                ours.usage.completion_tokens,
            )
            assert whole.usage.total_tokens == sum(
                (ours.usage.prompt_tokens, ours.usage.completion_tokens)
            )

    asyncio.run(main())


@pytest.mark.parametrize("prompt", ["the quick", ["the quick"], [60, 61, 62], [[60, 61, 62]]])
def test_a_completion_is_the_same_through_both_fronts(
    front: Any, say: Any, words: list[int], prompt: Any
) -> None:
    async def main() -> None:
        async with front(say(words)) as made:
            plain = prompt[0] if isinstance(prompt[0], list) or len(prompt) == 1 else prompt
            ours = await made.served.client.complete(plain, max_tokens=9)
            whole = await made.client.completions.create(model="tiny", prompt=prompt, max_tokens=9)
            stream = await made.client.completions.create(
                model="tiny", prompt=prompt, max_tokens=9, stream=True
            )
            texts, ends, _ = await read(stream)
            assert whole.choices[0].text == texts[0] == ours.text != ""
            assert whole.choices[0].finish_reason == ends[0] == "length"
            tokens = [item.prompt_token_ids for item in made.submissions]
            assert tokens[0] == tokens[1] == tokens[2]

    asyncio.run(main())


def test_prompts_of_one_request_are_answered_together(front: Any, words: list[int]) -> None:
    """Samples of prompt k come after those of prompt k - 1; each text is its own prompt's."""

    async def script(submission: Any) -> Any:
        said = [submission.prompt_token_ids[-1]] * 3
        for first, token in enumerate(said):
            await asyncio.sleep(0)
            end = {"finish": FinishReason.LENGTH} if first == 2 else {}
            yield [submission.event([token], first, sample_index=at, **end) for at in (0, 1)]

    async def main() -> None:
        async with front(script) as made:
            ask = {"model": "tiny", "prompt": ["a", [40], "b"], "n": 2, "logprobs": None}
            whole = await made.client.completions.create(**ask)
            wanted = ["aaa", "aaa", "GGG", "GGG", "bbb", "bbb"]
            assert [choice.text for choice in whole.choices] == wanted
            assert [choice.index for choice in whole.choices] == list(range(6))
            used = [len(item.prompt_token_ids) for item in made.submissions]
            assert whole.usage.prompt_tokens == sum(used) == 5
            assert whole.usage.completion_tokens == 18
            stream = await made.client.completions.create(
                **ask, stream=True, stream_options={"include_usage": True}
            )
            texts, ends, chunks = await read(stream)
            assert [texts[index] for index in range(6)] == wanted
            assert ends == dict.fromkeys(range(6), "length")
            assert chunks[-1].usage == whole.usage

    asyncio.run(main())


def test_the_events_of_a_stream(front: Any, say: Any, words: list[int]) -> None:
    """As they are on the wire: role first, usage last and only when asked for, then [DONE]."""

    async def events(made: Any, **more: Any) -> list[Any]:
        body = {"model": "tiny", "messages": USER, "max_tokens": 3, "stream": True, **more}
        answer = await made.http.post("/chat/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("\n\ndata: [DONE]\n\n")
        lines = [line for line in answer.text.split("\n\n") if line][:-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    async def main() -> None:
        async with front(say(words)) as made:
            plain = await events(made)
            assert plain[0]["object"] == "chat.completion.chunk"
            assert plain[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert plain[-1]["choices"][0]["finish_reason"] == "length"
            assert not any("usage" in chunk for chunk in plain)
            counted = await events(made, stream_options={"include_usage": True})
            assert [chunk["usage"] for chunk in counted[:-1]] == [None] * (len(counted) - 1)
            assert counted[-1]["choices"] == []
            assert counted[-1]["usage"]["completion_tokens"] == 3

    asyncio.run(main())


def test_every_field_reaches_the_engine(front: Any, say: Any) -> None:
    common: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 2**62, "stop": "x",
        "presence_penalty": 0.5, "frequency_penalty": -0.25, "logit_bias": {"5": -3.5},
        "user": "me",
    }  # fmt: skip
    extra = {
        "top_k": 11, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [7],
        "ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False,
        "include_stop_str_in_output": True, "no_repeat_ngram_size": 3, "bad_words": [],
        "priority": -3, "deadline_s": 20,
    }  # fmt: skip
    wanted = SamplingParams(
        temperature=0.7, top_p=0.9, n=2, seed=2**62, stop=("x",), presence_penalty=0.5,
        frequency_penalty=-0.25, logit_bias={5: -3.5}, top_k=11, min_p=0.05,
        repetition_penalty=1.1, stop_token_ids=(7,), ignore_eos=True, min_tokens=2,
        skip_special_tokens=False, include_stop=True, no_repeat_ngram_size=3,
        max_tokens=4, logprobs=3,
    )  # fmt: skip

    async def main() -> None:
        async with front(say([60, 61, 62])) as made:
            chat = made.client.chat.completions.create
            await chat(
                model="tiny", messages=USER, max_completion_tokens=4, logprobs=True,
                top_logprobs=3, response_format={"type": "text"}, tools=[],
                metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="x",
                extra_body=extra, **common,
            )  # fmt: skip
            await made.client.completions.create(
                model="tiny", prompt="a", max_tokens=4, logprobs=3, extra_body=extra,
                echo=False, best_of=2, **common,
            )  # fmt: skip
            assert [item.params for item in made.submissions] == [wanted, wanted]
            assert [item.priority for item in made.submissions] == [-3, -3]
            assert all(item.deadline is not None for item in made.submissions)

    asyncio.run(main())


FORMATS: list[tuple[dict[str, Any], Grammar]] = [
    (
        {"response_format": {"type": "json_object"}},
        Grammar("json_schema", '{"type": "object"}'),
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}},
            }
        },
        Grammar("json_schema", '{"type": "integer"}'),
    ),
    (
        {"extra_body": {"structured_outputs": {"json": {"type": "null"}}}},
        Grammar("json_schema", '{"type": "null"}'),
    ),
    ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, Grammar("regex", "a+")),
    (
        {"extra_body": {"structured_outputs": {"choice": ["a", "b"]}}},
        Grammar("choice", '["a", "b"]'),
    ),
    (
        {"extra_body": {"structured_outputs": {"grammar": 'start: "a"'}}},
        Grammar("lark", 'start: "a"'),
    ),
]


@pytest.mark.parametrize(("fields", "grammar"), FORMATS)
def test_what_an_answer_must_look_like_reaches_the_engine(
    front: Any, say: Any, fields: dict[str, Any], grammar: Grammar
) -> None:
    async def main() -> None:
        async with front(say([60])) as made:
            await made.client.chat.completions.create(model="tiny", messages=USER, **fields)
            assert made.submissions[0].params.grammar == grammar

    asyncio.run(main())


def test_what_nothing_said_means(front: Any, say: Any) -> None:
    """A chat may use the whole context; a completion has 16 tokens; -1 is no top-k."""

    async def main() -> None:
        async with front(say([60])) as made:
            await made.client.chat.completions.create(
                model="tiny", messages=USER, seed=1, extra_body={"top_k": -1, "min_p": None}
            )
            await made.client.completions.create(model="tiny", prompt="a", seed=1)
            assert [item.params for item in made.submissions] == [
                SamplingParams(seed=1),
                SamplingParams(seed=1, max_tokens=16),
            ]

    asyncio.run(main())


def test_parts_of_a_content_are_its_lines(front: Any, say: Any) -> None:
    async def main() -> None:
        async with front(say([60])) as made:
            parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
            for content in (parts, "one\ntwo"):
                await made.client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": content}]
                )
            first, second = made.submissions
            assert first.prompt_token_ids == second.prompt_token_ids

    asyncio.run(main())


def test_an_answer_can_be_sent_back(front: Any, say: Any, words: list[int]) -> None:
    """The message that the client made of the answer is a message of the next request."""

    async def main() -> None:
        async with front(say(words[:4])) as made:
            create = made.client.chat.completions.create
            answer = await create(model="tiny", messages=USER)
            said = answer.choices[0].message.model_dump()
            await create(model="tiny", messages=[*USER, said, *USER], max_tokens=1)
            assert len(made.submissions) == 2

    asyncio.run(main())


def scored(token: int, others: list[int]) -> SampledToken:
    top = [TokenLogprob(token_id=t, logprob=-0.5 - r, rank=r + 1) for r, t in enumerate(others)]
    own = TokenLogprob(token_id=token, logprob=-1.25, rank=2)
    return SampledToken(seq=0, token_id=token, logprob=own, top=top)


def test_logprobs(front: Any, say: Any, words: list[int], served_model: Any) -> None:
    tokens = [scored(words[0], words[:2]), scored(words[3], words[4:6])]

    def text(token: int) -> str:
        return str(served_model.tokenizer.decode([token]))

    async def main() -> None:
        async with front(say(tokens)) as made:
            ask = {"model": "tiny", "messages": USER, "logprobs": True, "top_logprobs": 2}
            whole = await made.client.chat.completions.create(**ask)
            stream = await made.client.chat.completions.create(**ask, stream=True)
            _, _, chunks = await read(stream)
            content = whole.choices[0].logprobs.content
            streamed = [
                item
                for chunk in chunks
                if chunk.choices[0].logprobs
                for item in chunk.choices[0].logprobs.content
            ]
            assert content == streamed
            assert [(item.token, item.logprob) for item in content] == [
                (text(words[0]), -1.25),
                (text(words[3]), -1.25),
            ]
            assert bytes(content[1].bytes).decode() == text(words[3])
            assert [(item.token, item.logprob) for item in content[1].top_logprobs] == [
                (text(words[4]), -0.5),
                (text(words[5]), -1.5),
            ]
            plain = {"model": "tiny", "prompt": "a", "logprobs": 2}
            done = (await made.client.completions.create(**plain)).choices[0].logprobs
            first, second = text(words[0]), text(words[3])
            assert done.tokens == [first, second]
            assert done.token_logprobs == [-1.25, -1.25]
            assert done.text_offset == [0, len(first)]
            assert done.top_logprobs[1] == {
                second: -1.25, text(words[4]): -0.5, text(words[5]): -1.5
            }  # fmt: skip
            stream = await made.client.completions.create(**plain, stream=True)
            _, _, chunks = await read(stream)
            parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
            assert [at for part in parts for at in part.text_offset] == done.text_offset
            assert [item for part in parts for item in part.top_logprobs] == done.top_logprobs

    asyncio.run(main())


def test_characters_of_several_tokens_come_whole(front: Any, say: Any, served_model: Any) -> None:
    tokens = served_model.tokenizer.encode("é🦊", add_special_tokens=False).ids
    assert len(tokens) == 6

    async def main() -> None:
        scores = [scored(token, []) for token in tokens]
        async with front(say(scores)) as made:
            ask = {"model": "tiny", "messages": USER}
            stream = await made.client.chat.completions.create(**ask, stream=True)
            texts, _, _ = await read(stream)
            assert texts == {0: "é🦊"}
            answer = await made.client.chat.completions.create(**ask, logprobs=True)
            assert answer.choices[0].message.content == "é🦊"
            assert [item.bytes for item in answer.choices[0].logprobs.content] == [None] * 6

    asyncio.run(main())


def test_the_id_ends_the_request_through_the_other_front(front: Any, endless: Any) -> None:
    async def main() -> None:
        async with front(endless) as made:
            stream = await made.client.completions.create(model="tiny", prompt="a", stream=True)
            chunk = await anext(aiter(stream))
            assert stream.response.headers["x-request-id"] == chunk.id
            await made.served.client.abort(chunk.id)
            _, ends, _ = await read(stream)
            assert ends == {0: "abort"}

    asyncio.run(main())


def test_an_end_token_stops(front: Any, say: Any, words: list[int]) -> None:
    script = say([*words[:3], 0], finish=FinishReason.STOP, stop_token=0)

    async def main() -> None:
        async with front(script) as made:
            answer = await made.client.chat.completions.create(model="tiny", messages=USER)
            assert answer.choices[0].finish_reason == "stop"
            assert "<|end|>" not in answer.choices[0].message.content
            assert answer.usage.completion_tokens == 4

    asyncio.run(main())


def test_models(front: Any, say: Any) -> None:
    async def main() -> None:
        async with front(say([60])) as made:
            listed = [model.id async for model in made.client.models.list()]
            assert listed == ["tiny"]
            assert (await made.client.models.retrieve("tiny")).id == "tiny"
            with pytest.raises(openai.NotFoundError, match="huge"):
                await made.client.models.retrieve("huge")

    asyncio.run(main())
