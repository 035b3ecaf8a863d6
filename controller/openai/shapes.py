"""Answers of the service in the shapes of OpenAI's API, whole and in chunks.

Scores are natural logarithms under the unmodified model. A text that is no whole characters has
no `bytes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, ClassVar

from phalanx.controller.server.answer import Response
from phalanx.protos.v1 import types_pb2

from .tools import call_chunks, shown_calls

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks."""

_FINISH = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_ABORT: "abort",
}


class _Sample:
    """What one sample has said so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.scores: list[types_pb2.PositionLogprobs] = []
        self.finish: str | None = None
        self.reasoning: list[str] = []
        self.calls: list[types_pb2.ToolCall] = []
        """Pieces of calls, or, of a stream, the last one."""
        self.offset = 0
        """Characters of all scored tokens that were shown."""


class Shape:
    """One answer. Feed it every message, through `chunks` or `add`, then ask for the end."""

    chunk_object: ClassVar[str]
    whole_object: ClassVar[str]

    def __init__(self, answer_id: str, model: str, *, samples: int, scored: bool) -> None:
        self._head = {"id": answer_id, "created": int(time.time()), "model": model}
        self._scored = scored
        self._samples = [_Sample() for _ in range(samples)]
        self._usage = types_pb2.Usage()
        self._prompt, self._said = 0, 0

    def admitted(self, prompt_tokens: int) -> None:
        """A prompt of so many tokens was accepted."""
        self._prompt += prompt_tokens

    # --- in chunks ---

    def chunks(
        self, message: Response, *, with_usage: bool, counting: bool = False
    ) -> Iterator[dict[str, Any]]:
        """What a message adds, a chunk for each sample. with_usage: have `usage`, as null, or, if
        `counting`, with the tokens so far."""
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        self._count(message)
        self._said += sum(len(delta.token_ids) for delta in message.samples)
        if counting:
            whole = self._prompt + self._said
            counts = {"prompt_tokens": self._prompt, "completion_tokens": self._said}
            extra = {"usage": counts | {"total_tokens": whole}}
        for delta in message.samples:
            for choice in self._choices(delta):
                yield self._head | {"object": self.chunk_object, "choices": [choice]} | extra

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk after the last one, for those who ask for usage."""
        return self._head | {"object": self.chunk_object, "choices": [], "usage": self._counts()}

    def _choices(self, delta: types_pb2.SampleDelta) -> Iterator[dict[str, Any]]:
        sample = self._samples[delta.index]
        sample.calls = [*delta.tool_calls] or sample.calls
        finish = _finish(delta, sample)
        piece = self._piece(delta)
        if not any(piece.values()) and not delta.logprobs and finish is None:
            return  # a character is not whole yet
        scores = self._scores(list(delta.logprobs), sample) if delta.logprobs else None
        yield {"index": delta.index, "logprobs": scores, "finish_reason": finish} | piece

    # --- as a whole ---

    def add(self, message: Response) -> None:
        """Keep what a message adds."""
        self._count(message)
        for delta in message.samples:
            sample = self._samples[delta.index]
            sample.texts.append(delta.text)
            sample.scores += delta.logprobs
            sample.reasoning.append(delta.reasoning)
            sample.calls += delta.tool_calls
            sample.finish = _finish(delta, sample) or sample.finish

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "logprobs": self._scores(sample.scores, sample) if self._scored else None,
                "finish_reason": sample.finish,
            }
            | self._content(sample)
            for index, sample in enumerate(self._samples)
        ]
        shown = {"object": self.whole_object, "choices": choices, "usage": self._counts()}
        return self._head | shown

    # --- both ---

    def _count(self, message: Response) -> None:
        if message.HasField("usage"):  # once for each prompt
            for name in ("prompt_tokens", "completion_tokens", "cached_prompt_tokens"):
                total = getattr(self._usage, name) + getattr(message.usage, name)
                setattr(self._usage, name, total)

    def _counts(self) -> dict[str, Any]:
        prompt, completion = self._usage.prompt_tokens, self._usage.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self._usage.cached_prompt_tokens},
        }

    def _piece(self, delta: types_pb2.SampleDelta) -> dict[str, Any]:
        raise NotImplementedError

    def _content(self, sample: _Sample) -> dict[str, Any]:
        raise NotImplementedError

    def _scores(
        self, positions: list[types_pb2.PositionLogprobs], sample: _Sample
    ) -> dict[str, Any]:
        raise NotImplementedError


class ChatShape(Shape):
    """Of `/v1/chat/completions`."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def __init__(self, answer_id: str, model: str, *, samples: int, scored: bool) -> None:
        super().__init__(answer_id, model, samples=samples, scored=scored)
        self._begun: set[int] = set()

    def _choices(self, delta: types_pb2.SampleDelta) -> Iterator[dict[str, Any]]:
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            begin = {"role": "assistant", "content": ""}
            yield {"index": delta.index, "delta": begin, "logprobs": None, "finish_reason": None}
        yield from super()._choices(delta)

    def _piece(self, delta: types_pb2.SampleDelta) -> dict[str, Any]:
        piece: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.reasoning:
            piece["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            piece["tool_calls"] = call_chunks(list(delta.tool_calls))
        return {"delta": piece}

    def _content(self, sample: _Sample) -> dict[str, Any]:
        text, reasoning = "".join(sample.texts), "".join(sample.reasoning)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if sample.calls:
            message |= {"content": text or None, "tool_calls": shown_calls(sample.calls)}
        return {"message": message}

    def _scores(
        self, positions: list[types_pb2.PositionLogprobs], sample: _Sample
    ) -> dict[str, Any]:
        content = [
            _scored(item.token) | {"top_logprobs": [_scored(other) for other in item.top]}
            for item in positions
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    """Of `/v1/completions`."""

    chunk_object = whole_object = "text_completion"

    def _piece(self, delta: types_pb2.SampleDelta) -> dict[str, Any]:
        return {"text": delta.text}

    def _content(self, sample: _Sample) -> dict[str, Any]:
        return {"text": "".join(sample.texts)}

    def _scores(
        self, positions: list[types_pb2.PositionLogprobs], sample: _Sample
    ) -> dict[str, Any]:
        """text_offset counts the tokens' own texts, from the start of the completion."""
        offsets = []
        for item in positions:
            offsets.append(sample.offset)
            sample.offset += len(item.token.text)
        return {
            "tokens": [item.token.text for item in positions],
            "token_logprobs": [_finite(item.token.logprob) for item in positions],
            "top_logprobs": [_by_text(item) for item in positions],
            "text_offset": offsets,
        }


def _finish(delta: types_pb2.SampleDelta, sample: _Sample) -> str | None:
    """Why a sample ended, if it has; a stop after calls is for their sake."""
    finish = _FINISH.get(delta.finish_reason)
    return "tool_calls" if finish == "stop" and sample.calls else finish


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def _scored(token: types_pb2.TokenLogprob) -> dict[str, Any]:
    whole = "\ufffd" not in token.text
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.text.encode()) if whole else None,
    }


def _by_text(item: types_pb2.PositionLogprobs) -> dict[str, float]:
    """The sampled token and the alternatives; of tokens with one text, the best."""
    found: dict[str, float] = {}
    for token in (item.token, *item.top):
        found[token.text] = max(_finite(token.logprob), found.get(token.text, LOWEST_LOGPROB))
    return found
