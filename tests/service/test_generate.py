"""Streams through a real server: tokens, texts, stops, scores, counts."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.steps import PromptLogprobs, SampledToken, TokenLogprob
from phalanx.protos.v1 import types_pb2

START = 1
WORDS = "the quick brown fox jumps over the lazy dog while forty-two geese say hello to the world"


def test_a_text_is_continued(serve: Any, say: Any, words: list[int], served_model: Any) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            answer = await served.client.complete("the fox", temperature=0.7, seed=5)
            (asked,) = served.engine.submissions
            prompt = served_model.tokenizer.encode("the fox").ids
            assert prompt[0] == START
            assert asked.prompt_token_ids == prompt
            assert asked.params.temperature == 0.7
            assert answer.text == WORDS
            assert list(answer.token_ids) == words
            assert (answer.finish_reason, answer.stop_reason) == ("length", "")
            assert (answer.seed, answer.request_id) == (5, asked.request_id)
            assert answer.usage.prompt_tokens == len(prompt)
            assert answer.usage.completion_tokens == len(words)
            assert served.books.started == ["Generate"]
            assert served.books.ended == [("length", len(prompt), len(words))]
            assert len(served.books.first_tokens) == 1
            assert answer.time_to_first_token_s <= answer.total_s

    asyncio.run(main())


def test_pieces_say_where_they_belong(serve: Any, say: Any, words: list[int]) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            texts, expected, messages = {0: "", 1: ""}, {0: 0, 1: 0}, []
            async for message in served.client.generate([5, 6], n=2, request_id="mine"):
                messages.append(message)
                assert message.request_id == "mine"
                for delta in message.samples:
                    assert delta.first_token_index == expected[delta.index]
                    expected[delta.index] += len(delta.token_ids)
                    texts[delta.index] += delta.text
            assert texts == {0: WORDS, 1: WORDS}
            assert [message.HasField("seed") for message in messages] == [True] + [False] * (
                len(messages) - 1
            )
            assert [message.HasField("usage") for message in messages] == [False] * (
                len(messages) - 1
            ) + [True]
            assert messages[-1].usage.completion_tokens == 2 * len(words)

    asyncio.run(main())


def test_a_seed_is_drawn_and_told(serve: Any, say: Any, words: list[int]) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            seeds = [(await served.client.complete("the", max_tokens=1)).seed for _ in range(4)]
            assert len(set(seeds)) == 4
            assert seeds == [item.params.seed for item in served.engine.submissions]
            again = await served.client.complete("the", max_tokens=1, seed=0)
            assert again.seed == 0 == served.engine.submissions[-1].params.seed

    asyncio.run(main())


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "include", "text", "reason"),
    [
        (["lazy"], False, "the quick brown fox jumps over the ", "lazy"),
        (["lazy"], True, "the quick brown fox jumps over the lazy", "lazy"),
        (["x j", "fox jumps"], False, "the quick brown fo", "x j"),
        (["cat", "y-t"], False, WORDS[: WORDS.index("y-t")], "y-t"),
        (["absent"], False, WORDS, ""),
        (["t"], False, "", "t"),
    ],
)
def test_a_stop_string_ends_the_sample(
    serve: Any,
    say: Any,
    words: list[int],
    served_model: Any,
    step: int,
    stop: list[str],
    include: bool,
    text: str,
    reason: str,
) -> None:
    decode = served_model.tokenizer.decode
    whole = next(
        (n for n in range(len(words)) if any(s in decode(words[:n]) for s in stop)), len(words)
    )

    async def main() -> None:
        async with serve(say(words, step=step)) as served:
            answer = await served.client.complete("the", stop=stop, include_stop=include)
            assert (answer.text, answer.stop_reason) == (text, reason)
            assert answer.finish_reason == ("stop" if reason else "length")
            assert list(answer.token_ids) == words[:whole]
            assert answer.usage.completion_tokens == whole
            (asked,) = served.engine.submissions
            assert asked.stopped == ([0] if reason else [])
            await asyncio.wait_for(asked.closed.wait(), 5)

    asyncio.run(main())


def test_stop_strings_wait_for_min_tokens(serve: Any, say: Any, words: list[int]) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            early = await served.client.complete("a", stop=["the"])
            late = await served.client.complete("a", stop=["the"], min_tokens=4)
            assert early.text == ""
            assert late.text == WORDS[: WORDS.index(" the") + 1]

    asyncio.run(main())


def test_one_sample_stops_and_the_other_goes_on(serve: Any, words: list[int]) -> None:
    async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
        for first, token in enumerate(words):
            yield [submission.event([token], first, sample_index=0)]
            yield [submission.event([words[0]], first, sample_index=1)]
            await asyncio.sleep(0)
        yield [submission.event((), len(words), sample_index=0, finish=FinishReason.ABORT)]
        yield [submission.event((), len(words), sample_index=1, finish=FinishReason.LENGTH)]

    async def main() -> None:
        async with serve(script) as served:
            answer = await served.client.complete("a", stop=["fox"], n=2)
            first, second = answer.samples
            assert (first.text, first.finish_reason) == ("the quick brown ", "stop")
            assert (second.finish_reason, len(second.token_ids)) == ("length", len(words))
            assert served.engine.submissions[0].stopped == [0]
            assert answer.usage.completion_tokens == len(first.token_ids) + len(words)

    asyncio.run(main())


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("special", [False, True])
def test_a_stop_token_counts_and_shows_when_asked(
    serve: Any, say: Any, words: list[int], include: bool, special: bool
) -> None:
    """Token 0 is the special <|end|>; a stop token is in the text only with `include_stop`."""
    said = [words[0], 0] if special else [words[0], words[1]]

    async def main() -> None:
        async with serve(say(said, finish=FinishReason.STOP, stop_token=said[1])) as served:
            answer = await served.client.complete(
                "a", include_stop=include, skip_special_tokens=False
            )
            shown = "<|end|>" if special else WORDS[3:9]
            assert answer.text == "the" + (shown if include else "")
            assert list(answer.token_ids) == said
            assert answer.usage.completion_tokens == 2
            assert (answer.finish_reason, answer.stop_reason) == ("stop", str(said[1]))

    asyncio.run(main())


def test_special_tokens_are_left_out_unless_asked_for(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([1, 50, 0, 51])) as served:
            hidden = await served.client.complete("a")
            shown = await served.client.complete("a", skip_special_tokens=False)
            assert "<|" not in hidden.text
            assert shown.text.startswith("<|start|>")
            assert "<|end|>" in shown.text
            assert hidden.token_ids == shown.token_ids == (1, 50, 0, 51)

    asyncio.run(main())


def test_characters_are_never_cut(serve: Any, say: Any, served_model: Any) -> None:
    text = "naïve 東京 🏳️‍🌈 done"
    tokens = served_model.tokenizer.encode(text, add_special_tokens=False).ids

    async def main() -> None:
        async with serve(say(tokens)) as served:
            pieces = [
                delta.text
                async for message in served.client.generate("a")
                for delta in message.samples
            ]
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)
            cut = await served.client.complete("a", max_tokens=3)
            assert cut.text == served_model.tokenizer.decode(tokens[:3])

    asyncio.run(main())


def scored(token: int, *others: int) -> SampledToken:
    top = [TokenLogprob(token_id=t, logprob=-0.5 - t, rank=r + 1) for r, t in enumerate(others)]
    return SampledToken(
        seq=0,
        token_id=token,
        logprob=TokenLogprob(token_id=token, logprob=-1.25, rank=7),
        top=top,
    )


def test_scores_come_with_their_tokens(
    serve: Any, say: Any, words: list[int], served_model: Any
) -> None:
    async def main() -> None:
        async with serve(say([scored(words[1], 5, 6), scored(0)])) as served:
            answer = await served.client.complete("a", logprobs=2)
            first, second = answer.samples[0].logprobs
            text = served_model.tokenizer.decode([words[1]])
            assert first.token == types_pb2.TokenLogprob(
                token_id=words[1], text=text, logprob=-1.25, rank=7
            )
            assert [item.token_id for item in first.top] == [5, 6]
            assert second.token.text == "<|end|>"

    asyncio.run(main())


def test_prompt_scores_come_whole_on_the_first_message(serve: Any, words: list[int]) -> None:
    prompt = words[:6]

    def run(submission: Any, start: int, stop: int) -> TokenEvent:
        tokens = [TokenLogprob(token_id=t, logprob=-float(t), rank=1) for t in prompt[start:stop]]
        return submission.event(
            prompt_logprobs=PromptLogprobs(
                seq=0, start=start, tokens=tokens, top=[[token] for token in tokens]
            )
        )

    async def script(submission: Any) -> AsyncIterator[list[TokenEvent]]:
        yield [run(submission, 1, 3)]
        await asyncio.sleep(0.05)
        yield [run(submission, 2, 6)]  # some of it again, as after a preemption
        await asyncio.sleep(0.05)
        yield [submission.event([5], cached_prompt_tokens=4)]
        yield [submission.event([6], 1, finish=FinishReason.LENGTH)]

    async def main() -> None:
        async with serve(script) as served:
            messages = [item async for item in served.client.generate(prompt, prompt_logprobs=1)]
            scores = messages[0].prompt_logprobs
            assert len(scores) == len(prompt)
            assert scores[0] == types_pb2.PositionLogprobs()
            assert [item.token.token_id for item in scores[1:]] == prompt[1:]
            assert [item.top[0].logprob for item in scores[1:]] == [-float(t) for t in prompt[1:]]
            assert not any(message.prompt_logprobs for message in messages[1:])
            assert messages[-1].usage.cached_prompt_tokens == 4

    asyncio.run(main())


def test_chat_renders_the_template_and_does_not_add_a_start(
    serve: Any, say: Any, words: list[int], served_model: Any
) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            talk = [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": "the fox"},
            ]
            answer = await served.client.ask(talk)
            await served.client.ask("hi")
            assert answer.text == WORDS
            text = (
                "<|start|>system\nbe brief<|end|>\n<|start|>user\nhello<|end|>\n<|start|>assistant"
                "\n<|end|>\n<|start|>user\nthe fox<|end|>\n<|start|>assistant\n"
            )
            tokens = served_model.tokenizer.encode(text, add_special_tokens=False).ids
            first, second = served.engine.submissions
            assert first.prompt_token_ids == tokens
            assert second.prompt_token_ids.count(START) == 2
            assert served.books.started == ["Chat", "Chat"]

    asyncio.run(main())


def test_bad_words_are_banned_as_they_are_tokenised(
    serve: Any, say: Any, words: list[int], served_model: Any
) -> None:
    async def main() -> None:
        async with serve(say(words)) as served:
            await served.client.complete("a", bad_words=["fox", " lazy dog"], max_tokens=1)
            encode = functools.partial(served_model.tokenizer.encode, add_special_tokens=False)
            expected = [tuple(encode(w).ids) for w in ("fox", " fox", "lazy dog", " lazy dog")]
            assert list(served.engine.submissions[0].params.bad_words_ids) == expected

    asyncio.run(main())


def test_every_parameter_reaches_the_engine(serve: Any, say: Any, words: list[int]) -> None:
    given: dict[str, Any] = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.3, "top_k": 7, "top_p": 0.9,
        "min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": -0.2,
        "frequency_penalty": 0.4, "no_repeat_ngram_size": 3, "logit_bias": {4: -1.7},
        "stop": ("x", "y"), "stop_token_ids": (8, 9), "ignore_eos": True, "include_stop": True,
        "seed": 2**62, "n": 2, "logprobs": 3, "prompt_logprobs": 4, "skip_special_tokens": False,
    }  # fmt: skip

    async def main() -> None:
        async with serve(say(words)) as served:
            async for _ in served.client.generate([3], **given):
                break
            params = served.engine.submissions[0].params
            assert {name: getattr(params, name) for name in given} == given

    asyncio.run(main())


def test_tokens_of_texts_and_texts_of_tokens(serve: Any, say: Any, served_model: Any) -> None:
    async def main() -> None:
        async with serve(say([5])) as served:
            for text in ("", "the fox", "東京 🏳️‍🌈", "<|start|>x", "word " * 3000):
                ids = await served.client.tokenize(text)
                assert ids == served_model.tokenizer.encode(text, add_special_tokens=False).ids
                assert await served.client.detokenize(ids) == text
                with_start = await served.client.tokenize(text, add_special_tokens=True)
                assert with_start == [START, *ids]
            ids = await served.client.tokenize("<|start|>x")
            assert await served.client.detokenize(ids, skip_special_tokens=True) == "x"

    asyncio.run(main())


def test_the_model_and_the_cluster_describe_themselves(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([5])) as served:
            info = await served.client.model_info()
            assert (info.name, info.family, info.dtype) == ("tiny", "llama", "float32")
            assert (info.max_context, list(info.eos_token_ids)) == (64, [0])
            assert info.has_chat_template and info.server_version
            state = await served.client.cluster_state()
            (replica,) = state.replicas
            assert (state.queued_requests, replica.replica_id, replica.steps) == (
                2,
                "replica-0",
                11,
            )
            rank = replica.ranks[0]
            assert (rank.device, rank.head_stop) == ("cpu", 3)
            assert (rank.stage, rank.layer_start, rank.layer_stop) == (1, 4, 6)

    asyncio.run(main())
