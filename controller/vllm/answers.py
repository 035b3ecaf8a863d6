"""Messages of the service as answers of the vLLM engine's protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from phalanx.protos.v1 import serving_pb2, types_pb2

_FINISH = {
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_ABORT: "abort",
}


class Answers:
    """The answers to one request: chunks as tokens come and a last word for each sample, or the
    last words alone. pb: the protocol's messages."""

    def __init__(self, pb: Any, request: Any) -> None:
        self._pb, self._stream = pb, request.stream
        params = request.sampling_params
        self._top = params.HasField("logprobs") and params.logprobs > 0
        self.prompt_tokens, self._cached = 0, 0
        self._tokens: dict[int, list[int]] = {}
        self._scores: dict[int, list[types_pb2.PositionLogprobs]] = {}
        self._prompt_scores: list[types_pb2.PositionLogprobs] = []
        self._ended: list[types_pb2.SampleDelta] = []

    def fold(self, message: serving_pb2.GenerateResponse) -> Iterator[Any]:
        """What a message adds. Last words wait for the counts, which come with the last message."""
        self._prompt_scores += message.prompt_logprobs
        if message.HasField("usage"):
            self.prompt_tokens = message.usage.prompt_tokens
            self._cached = message.usage.cached_prompt_tokens
        for delta in message.samples:
            fresh = delta.index not in self._tokens
            self._tokens.setdefault(delta.index, []).extend(delta.token_ids)
            self._scores.setdefault(delta.index, []).extend(delta.logprobs)
            if delta.finish_reason:
                self._ended.append(delta)
            if self._stream and delta.token_ids:
                yield self._pb.GenerateResponse(chunk=self._chunk(delta, fresh))
        if message.HasField("usage"):
            for delta in self._ended:
                yield self._pb.GenerateResponse(complete=self._complete(delta))

    def _chunk(self, delta: types_pb2.SampleDelta, fresh: bool) -> Any:
        return self._pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(delta.token_ids),
            cached_tokens=self._cached,
            output_logprobs=self._output(delta.logprobs),
            input_logprobs=self._input() if fresh else None,
            index=delta.index,
        )

    def _complete(self, delta: types_pb2.SampleDelta) -> Any:
        """Of a stream, with its last tokens again, which its chunks have had."""
        tokens = self._tokens[delta.index]
        scores = self._scores[delta.index]
        if self._stream:
            tokens, scores = list(delta.token_ids), list(delta.logprobs)
        message = self._pb.GenerateComplete(
            output_ids=tokens,
            finish_reason=_FINISH.get(delta.finish_reason, "error"),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self._tokens[delta.index]),
            cached_tokens=self._cached,
            output_logprobs=self._output(scores),
            input_logprobs=self._input(),
            index=delta.index,
        )
        if delta.stop_reason.isdecimal():
            message.matched_token_id = int(delta.stop_reason)
        elif delta.stop_reason:
            message.matched_stop_str = delta.stop_reason
        return message

    def _output(self, scores: Sequence[types_pb2.PositionLogprobs]) -> Any:
        if not scores:
            return None
        return self._pb.OutputLogProbs(
            token_logprobs=[item.token.logprob for item in scores],
            token_ids=[item.token.token_id for item in scores],
            top_logprobs=[self._tops(item) for item in scores] if self._top else (),
        )

    def _input(self) -> Any:
        scores = self._prompt_scores
        if not scores:
            return None
        found = self._pb.InputLogProbs(top_logprobs=[self._tops(item) for item in scores])
        for item in scores:
            found.token_logprobs.add()
            if item.HasField("token"):
                found.token_logprobs[-1].value = item.token.logprob
            found.token_ids.append(item.token.token_id)
        return found

    def _tops(self, item: types_pb2.PositionLogprobs) -> Any:
        return self._pb.TopLogProbs(
            values=[token.logprob for token in item.top],
            token_ids=[token.token_id for token in item.top],
        )
