"""A finished answer, put together from the messages of its stream."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from phalanx.protos.errors import Unavailable
from phalanx.protos.v1 import serving_pb2, types_pb2

FINISH_NAMES = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_ABORT: "abort",
}
Response = serving_pb2.GenerateResponse | serving_pb2.ChatResponse | serving_pb2.ResumeResponse


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of the n samples."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """"stop", "length" or "abort"."""
    stop_reason: str
    """The stop string, or the token id in decimal, that ended it; else empty."""
    logprobs: tuple[types_pb2.PositionLogprobs, ...] = ()
    """One a token, when asked for."""
    tool_calls: tuple[types_pb2.ToolCall, ...] = ()
    """What it calls, with whole arguments; they are not in the text."""
    reasoning: str = ""
    """What came before the answer, of models that mark it as such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer; `text`, `token_ids`, `finish_reason` and `stop_reason` are those of sample 0."""

    request_id: str
    samples: tuple[Sample, ...]
    seed: int
    """With the same prompt and parameters it gives the same answer again."""
    usage: types_pb2.Usage
    time_to_first_token_s: float | None
    """Since the request was sent; None when no token came."""
    total_s: float
    prompt_logprobs: tuple[types_pb2.PositionLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """The text of sample 0."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of sample 0, with the one that ended it."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why sample 0 ended."""
        return self.samples[0].finish_reason

    @property
    def stop_reason(self) -> str:
        """What ended sample 0, if it was a stop."""
        return self.samples[0].stop_reason


@dataclass(slots=True)
class _Sample:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    stop_reason: str = ""
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, types_pb2.ToolCall] = field(default_factory=dict)


class Collector:
    """Takes in the messages of one stream. Its clock starts when it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._samples: dict[int, _Sample] = {}
        self._prompt_logprobs: list[types_pb2.PositionLogprobs] = []
        self._request_id, self._seed = "", 0
        self._usage: types_pb2.Usage | None = None

    def add(self, message: Response) -> None:
        """The next message."""
        self._request_id = message.request_id
        if message.HasField("seed"):
            self._seed = message.seed
        if message.HasField("usage"):
            self._usage = message.usage
        self._prompt_logprobs += message.prompt_logprobs
        for delta in message.samples:
            self._add_delta(delta)

    def _add_delta(self, delta: types_pb2.SampleDelta) -> None:
        sample = self._samples.setdefault(delta.index, _Sample())
        if delta.token_ids and self._first is None:
            self._first = time.perf_counter() - self._began
        if delta.token_ids and delta.first_token_index != len(sample.token_ids):
            raise Unavailable(
                f"the stream went from token {len(sample.token_ids)} to {delta.first_token_index}"
            )
        sample.texts.append(delta.text)
        sample.token_ids += delta.token_ids
        sample.logprobs += delta.logprobs
        sample.reasoning.append(delta.reasoning)
        for piece in delta.tool_calls:
            call = sample.tool_calls.setdefault(piece.index, types_pb2.ToolCall(index=piece.index))
            call.id, call.name = call.id or piece.id, call.name or piece.name
            call.arguments += piece.arguments
        if delta.finish_reason:
            sample.finish_reason = FINISH_NAMES.get(delta.finish_reason, "unknown")
            sample.stop_reason = delta.stop_reason

    def completion(self) -> Completion:
        """The whole answer. Raises `Unavailable` when the stream broke off before its end."""
        if self._usage is None or not all(item.finish_reason for item in self._samples.values()):
            raise Unavailable("the stream ended before the answer did")
        return Completion(
            request_id=self._request_id,
            samples=tuple(_finished(self._samples[index]) for index in sorted(self._samples)),
            seed=self._seed,
            usage=self._usage,
            time_to_first_token_s=self._first,
            total_s=time.perf_counter() - self._began,
            prompt_logprobs=tuple(self._prompt_logprobs),
        )


def _finished(item: _Sample) -> Sample:
    return Sample(
        text="".join(item.texts),
        token_ids=tuple(item.token_ids),
        finish_reason=item.finish_reason,
        stop_reason=item.stop_reason,
        logprobs=tuple(item.logprobs),
        tool_calls=tuple(item.tool_calls.values()),
        reasoning="".join(item.reasoning),
    )
