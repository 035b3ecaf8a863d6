"""An answer is a function of the tokens: cuts into events and messages change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phalanx.controller.completion import Collector
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.controller.server.answer import MESSAGE_BYTES, Answer
from phalanx.controller.server.tokens import TokenTexts
from phalanx.protos.errors import RequestFailed, ResourceExhausted
from phalanx.protos.limits import MAX_MESSAGE_BYTES
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import PromptLogprobs, SampledToken, TokenLogprob
from phalanx.protos.v1 import serving_pb2


def make_texts() -> TokenTexts:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "the", "ab", "ba"]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return TokenTexts(tokenizer)


TEXTS = make_texts()


def token(token_id: int, *, scored: int | None = None) -> SampledToken:
    if scored is None:
        return SampledToken(seq=0, token_id=token_id)
    score = TokenLogprob(token_id=token_id, logprob=-float(token_id), rank=1)
    return SampledToken(seq=0, token_id=token_id, logprob=score, top=[score] * scored)


def event(sample: int, first: int, tokens: list[SampledToken], **more: Any) -> TokenEvent:
    return TokenEvent(
        request_id="r", sample_index=sample, first_index=first, tokens=tuple(tokens), **more
    )


def take_all(answer: Answer) -> Iterator[serving_pb2.GenerateResponse]:
    while (message := answer.take(serving_pb2.GenerateResponse, "r")) is not None:
        assert isinstance(message, serving_pb2.GenerateResponse)
        yield message


def run(
    params: SamplingParams, outputs: list[list[int]], cuts: Iterator[int], takes: Iterator[bool]
) -> tuple[Any, list[int]]:
    """Feed all samples in turn, cut as told; the completion, and which samples were stopped."""
    stopped: list[int] = []
    answer = Answer(TEXTS, params, [1, 2], stopped.append)
    collector = Collector()
    left = [list(enumerate(ids)) for ids in outputs]
    while any(left):
        for sample, rest in enumerate(left):
            if not rest:
                continue
            part = rest[: next(cuts)]
            del rest[: len(part)]
            more = {} if rest else {"finish": FinishReason.LENGTH}
            scored = [token(item, scored=params.logprobs) for _, item in part]
            answer.fold([event(sample, part[0][0], scored, **more)])
            if next(takes):
                for message in take_all(answer):
                    collector.add(message)
    for message in take_all(answer):
        collector.add(message)
    assert answer.finished
    return collector.completion(), stopped


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_cuts_change_nothing(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 3))
    ids = st.lists(st.integers(0, 258), min_size=1, max_size=16)
    outputs = data.draw(st.lists(ids, min_size=count, max_size=count))
    params = SamplingParams(
        n=count,
        stop=tuple(data.draw(st.lists(st.text("abthe", min_size=1, max_size=3), max_size=3))),
        include_stop=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 4)),
        logprobs=data.draw(st.none() | st.integers(0, 2)),
    )
    once = iter(lambda: 10**6, None)
    whole, stopped = run(params, outputs, once, iter(lambda: False, None))
    cuts = data.draw(st.lists(st.integers(1, 5), min_size=64, max_size=64))
    takes = data.draw(st.lists(st.booleans(), min_size=64, max_size=64))
    cut, stopped_cut = run(params, outputs, iter(cuts), iter(takes))
    assert cut.samples == whole.samples
    assert cut.usage == whole.usage
    assert sorted(stopped) == sorted(stopped_cut)
    for sample, given_ids in zip(whole.samples, outputs, strict=True):
        assert list(sample.token_ids) == given_ids[: len(sample.token_ids)]
        if params.logprobs is not None:
            assert [item.token.token_id for item in sample.logprobs] == list(sample.token_ids)


def test_messages_stay_below_the_limit_whatever_waits() -> None:
    params = SamplingParams(logprobs=20, prompt_logprobs=20)
    prompt = [5] * 8000
    answer = Answer(TEXTS, params, prompt, lambda index: None)
    score = TokenLogprob(token_id=258, logprob=-1.0, rank=1)
    run_of = PromptLogprobs(seq=0, start=1, tokens=[score] * 7999, top=[[score] * 20] * 7999)
    answer.fold([event(0, 0, [], prompt_logprobs=run_of)])
    assert answer.take(serving_pb2.GenerateResponse, "r") is None
    many = [token(258, scored=20)] * 6000
    answer.fold([event(0, 0, many, finish=FinishReason.LENGTH)])
    messages = list(take_all(answer))
    assert all(
        message.ByteSize() < MESSAGE_BYTES + 4096 < MAX_MESSAGE_BYTES for message in messages
    )
    assert sum(len(message.prompt_logprobs) for message in messages) == 8000
    tokens = [t for message in messages for delta in message.samples for t in delta.token_ids]
    assert tokens == [258] * 6000
    begun = [bool(message.samples) for message in messages]
    assert begun == sorted(begun)
    assert [message.HasField("usage") for message in messages].index(True) == len(messages) - 1


def test_tokens_out_of_step_are_an_error_and_repeated_ones_are_not() -> None:
    answer = Answer(TEXTS, SamplingParams(), [1], lambda index: None)
    answer.fold([event(0, 0, [token(256), token(257)])])
    answer.fold([event(0, 1, [token(257), token(258)])])
    (message,) = take_all(answer)
    assert list(message.samples[0].token_ids) == [256, 257, 258]
    assert message.samples[0].text == "theabba"
    with pytest.raises(RequestFailed, match="tokens 3 to 4 are missing"):
        answer.fold([event(0, 5, [token(256)])])


def test_lost_prompt_scores_are_an_error() -> None:
    answer = Answer(TEXTS, SamplingParams(prompt_logprobs=0), [1] * 9, lambda index: None)
    score = TokenLogprob(token_id=1, logprob=-1.0, rank=1)
    late = PromptLogprobs(seq=0, start=4, tokens=[score], top=[[]])
    with pytest.raises(RequestFailed, match="scores of prompt tokens before 4"):
        answer.fold([event(0, 0, [], prompt_logprobs=late)])
    early = PromptLogprobs(seq=0, start=1, tokens=[score] * 3, top=[[]] * 3)
    answer.fold([event(0, 0, [], prompt_logprobs=early)])
    with pytest.raises(RequestFailed, match="scores of prompt tokens from 4 on"):
        answer.fold([event(0, 0, [token(256)])])


def test_a_prompt_of_one_token_has_one_empty_score() -> None:
    answer = Answer(TEXTS, SamplingParams(prompt_logprobs=0), [1], lambda index: None)
    answer.fold([event(0, 0, [token(256)])])
    (message,) = take_all(answer)
    assert len(message.prompt_logprobs) == 1
    assert not message.prompt_logprobs[0].HasField("token")


def test_nobody_reads() -> None:
    answer = Answer(TEXTS, SamplingParams(logprobs=20), [1], lambda index: None)
    with pytest.raises(ResourceExhausted, match="wait to be read"):
        for first in range(0, 10**6, 100):
            answer.fold([event(0, first, [token(258, scored=20)] * 100)])
