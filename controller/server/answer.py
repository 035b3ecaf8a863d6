"""One request's answer: token events in, messages of any size out.

The texts, stops and counts are a pure function of the tokens; how events are cut into batches and
batches into messages changes none of them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from phalanx.controller.bell import Bell
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.controller.tools.formats import Reading
from phalanx.controller.tools.scanning import Piece, ToolReader
from phalanx.protos.errors import (
    DeadlineExceeded,
    RequestFailed,
    ResourceExhausted,
)
from phalanx.protos.limits import MAX_UNREAD_BYTES
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import PromptLogprobs, SampledToken, TokenLogprob
from phalanx.protos.v1 import serving_pb2, types_pb2

from .tokens import SampleText, TokenTexts

MESSAGE_BYTES = 1024 * 1024
TOKEN_BYTES = 16
SLOW_RETRY_S = 1.0

_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
}
Response = serving_pb2.GenerateResponse | serving_pb2.ChatResponse | serving_pb2.ResumeResponse


@dataclass(frozen=True, slots=True)
class Received:
    """What a reader has got of an answer already: tokens of each sample, and scores of the prompt."""

    tokens: Sequence[int] = ()
    prompt: int = 0


@dataclass(slots=True)
class _Piece:
    """What one token, or the end, adds to a sample."""

    sample: int
    first: int
    token_id: int | None
    text: str
    position: types_pb2.PositionLogprobs | None = None
    finish: FinishReason | None = None
    stop_reason: str = ""
    found: Sequence[Piece] = ()
    """What a reader of tool calls made of the text, where there is one."""
    size: int = 0
    """About how many bytes it takes in a message."""


class Answer:
    """Events are folded in as they come; `take` gives what has not been sent, in few messages."""

    def __init__(
        self,
        texts: TokenTexts,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_sample: Callable[[int], None],
        received: Received = Received(),
        tools: Reading | None = None,
    ) -> None:
        """received: is left out. stop_sample: told which samples have met a stop string. tools:
        how calls are read from the text; None: it has none."""
        self._texts, self._params, self._prompt = texts, params, prompt_token_ids
        self._stop_sample, self._received = stop_sample, received
        self._samples = [
            SampleText(
                texts.stream(params.skip_special_tokens),
                params.stop,
                include=params.include_stop,
                min_tokens=params.min_tokens,
            )
            for _ in range(params.n)
        ]
        self._tools = tools
        self._readers: list[ToolReader] = (
            [] if tools is None else [tools.reader() for _ in range(params.n)]
        )
        self._reasons: list[FinishReason | None] = [None] * params.n
        self._open = params.n
        self._pieces: deque[_Piece] = deque()
        self._unread = 0
        self._scores: deque[types_pb2.PositionLogprobs] = deque()
        self._scored = 0
        self._scores_sent = received.prompt
        if params.prompt_logprobs is not None:
            self._add_score(types_pb2.PositionLogprobs())  # nothing comes before the first
        self._cached = 0
        self._first = True
        self.news = Bell()
        """Rings when there is something to take, the answer is over, or more is to be folded in."""
        self.taken_tokens = 0
        """In the message that `take` has made last."""
        self.error: Exception | None = None
        """Why the answer ends without its samples having finished."""

    @property
    def finished(self) -> bool:
        """Whether every sample has come to its end."""
        return not self._open

    @property
    def over(self) -> bool:
        """Whether nothing more will be folded in."""
        return not self._open or self.error is not None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to take."""
        return not self._pieces

    @property
    def plenty(self) -> bool:
        """Whether there is enough to take for a message of the largest size."""
        return self._unread >= MESSAGE_BYTES or bool(self._scores)

    @property
    def completion_tokens(self) -> int:
        """Tokens of all samples so far."""
        return sum(sample.count for sample in self._samples)

    @property
    def outcome(self) -> str:
        """How the first sample ended."""
        reason = self._reasons[0]
        return reason.value if reason else "error"

    def fail(self, error: Exception) -> None:
        """The answer ends here; what was folded in before is still to be sent."""
        if not self.over:
            self.error = error
        self.news.ring(urgent=True)

    @property
    def new_tokens(self) -> int:
        """Tokens of all samples so far that the reader had not got before."""
        had = [*self._received.tokens, *[0] * len(self._samples)]
        return sum(max(sample.count - had[i], 0) for i, sample in enumerate(self._samples))

    def fold(self, events: Iterable[TokenEvent]) -> None:
        """Take in a batch of events. Raises what an event carries as its error."""
        for event in events:
            if event.sample_index == 0:
                self._cached = max(self._cached, event.cached_prompt_tokens)
                if event.prompt_logprobs is not None:
                    self._score_prompt(event.prompt_logprobs)
            if self._reasons[event.sample_index] is None:
                self._fold(event)
        if self._pieces or self.over:
            self.news.ring(urgent=self.over)
        if self._unread > MAX_UNREAD_BYTES:
            raise ResourceExhausted(
                f"{self._unread} bytes of the answer wait to be read, at most {MAX_UNREAD_BYTES} "
                "may",
                SLOW_RETRY_S,
            )

    def _fold(self, event: TokenEvent) -> None:
        sample = self._samples[event.sample_index]
        if event.tokens and event.sample_index == 0 and 0 < self._scored < len(self._prompt):
            raise RequestFailed(f"scores of prompt tokens from {self._scored} on are missing")
        if event.first_index > sample.count:
            raise RequestFailed(f"tokens {sample.count} to {event.first_index - 1} are missing")
        new = event.tokens
        if event.first_index < sample.count:
            new = new[sample.count - event.first_index :]
        for place, token in enumerate(new):
            ends = event.stop_token is not None and place == len(new) - 1
            self._add_token(event.sample_index, token, ends)
            if sample.stopped is not None:
                self._stop_sample(event.sample_index)
                self._end(event.sample_index, FinishReason.STOP, "", sample.stopped)
                return
        match event.finish:
            case None:
                return
            case FinishReason.DEADLINE:
                raise DeadlineExceeded(f"the deadline passed after {self.completion_tokens} tokens")
            case FinishReason.ERROR:
                raise event.error or RequestFailed("the request failed")
        text, reason = sample.finish(), event.finish
        named = "" if event.stop_token is None else str(event.stop_token)
        if sample.stopped is not None:  # the stop string was in what the end made certain
            reason, named = FinishReason.STOP, sample.stopped
        self._end(event.sample_index, reason, text, named)

    def _add_token(self, index: int, token: SampledToken, ends: bool) -> None:
        sample = self._samples[index]
        first = sample.count
        if ends and not self._params.include_stop:
            sample.skip()
            text = ""
        else:
            text = sample.push(token.token_id)
        position = None
        if token.logprob is not None:
            position = self._position(token.logprob, token.top)
        found = self._found(index, text) if self._readers else ()
        self._add(_Piece(index, first, token.token_id, text, position, found=found))

    def _end(self, index: int, reason: FinishReason, text: str, stop_reason: str) -> None:
        self._reasons[index] = reason
        self._open -= 1
        count = self._samples[index].count
        found = self._found(index, text, last=True)
        self._add(
            _Piece(index, count, None, text, finish=reason, stop_reason=stop_reason, found=found)
        )

    def _found(self, index: int, text: str, *, last: bool = False) -> Sequence[Piece]:
        """What the text says besides text, where calls are looked for."""
        if not self._readers:
            return ()
        found = self._readers[index].push(text)
        return [*found, *self._readers[index].finish()] if last else found

    def _add(self, piece: _Piece) -> None:
        if self._received.tokens:
            had = self._received.tokens[piece.sample : piece.sample + 1]
            if piece.token_id is not None and had and piece.first < had[0]:
                return
        scored = 0 if piece.position is None else piece.position.ByteSize()
        piece.size = TOKEN_BYTES + len(piece.text.encode()) + scored
        self._pieces.append(piece)
        self._unread += piece.size

    def _score_prompt(self, run: PromptLogprobs) -> None:
        """Take in a run of scored prompt tokens; repeated ones are the same as before."""
        if run.start > self._scored:
            raise RequestFailed(f"scores of prompt tokens before {run.start} are missing")
        done = self._scored - run.start
        for token, top in zip(run.tokens[done:], run.top[done:], strict=True):
            self._add_score(self._position(token, top))

    def _add_score(self, score: types_pb2.PositionLogprobs) -> None:
        if self._scored >= self._received.prompt:
            self._scores.append(score)
        self._scored += 1

    def _position(
        self, token: TokenLogprob, top: Iterable[TokenLogprob]
    ) -> types_pb2.PositionLogprobs:
        return types_pb2.PositionLogprobs(
            token=self._logprob(token), top=[self._logprob(item) for item in top]
        )

    def _logprob(self, item: TokenLogprob) -> types_pb2.TokenLogprob:
        return types_pb2.TokenLogprob(
            token_id=item.token_id,
            text=self._texts.alone(item.token_id),
            logprob=item.logprob,
            rank=item.rank,
        )

    def take(self, kind: type[Response], request_id: str) -> Response | None:
        """A message with all that waits, up to about `MESSAGE_BYTES`; None when nothing does."""
        if not self._pieces:
            return None
        message = kind(request_id=request_id)
        if self._first:
            message.seed, self._first = self._params.seed, False
        self.taken_tokens = 0
        if len(self._pieces) == 1 and not self._scores and self._tools is None:
            self._put(message, self._pieces.popleft())
        else:
            self._fill(message, request_id)
        if not self._open and not self._pieces:
            message.usage.CopyFrom(self.usage())
        return message

    def _put(self, message: Response, piece: _Piece) -> None:
        """All that there is to say: nearly every message has one piece."""
        self._unread -= piece.size
        ids = () if piece.token_id is None else (piece.token_id,)
        self.taken_tokens = len(ids)
        delta = message.samples.add(
            index=piece.sample, first_token_index=piece.first, token_ids=ids, text=piece.text
        )
        if piece.position is not None or piece.finish is not None:
            _mark(delta, piece)

    def _fill(self, message: Response, request_id: str) -> None:
        """As much as there is and fits."""
        room = MESSAGE_BYTES
        if self._scores:
            message.first_prompt_index = self._scores_sent
        while self._scores and room > 0:
            room -= self._scores[0].ByteSize() + 4
            message.prompt_logprobs.append(self._scores.popleft())
            self._scores_sent += 1
        deltas: dict[int, types_pb2.SampleDelta] = {}
        texts: dict[int, list[str]] = {}
        while self._pieces and not self._scores and room > 0:
            piece = self._pieces.popleft()
            self._unread -= piece.size
            room -= piece.size
            if piece.sample not in deltas:
                deltas[piece.sample] = message.samples.add(
                    index=piece.sample, first_token_index=piece.first
                )
                texts[piece.sample] = []
            if piece.token_id is not None:
                deltas[piece.sample].token_ids.append(piece.token_id)
                self.taken_tokens += 1
            _mark(deltas[piece.sample], piece)
            if self._tools is None:
                texts[piece.sample].append(piece.text)
            for item in piece.found:
                texts[piece.sample].append(item.text)
                self._extend(deltas[piece.sample], item, request_id)
        for index, delta in deltas.items():
            delta.text = "".join(texts[index])

    def _extend(self, delta: types_pb2.SampleDelta, found: Piece, request_id: str) -> None:
        delta.reasoning += found.reasoning
        if found.call is None or self._tools is None:
            return
        if found.name:
            key = f"{request_id}/{delta.index}/{found.call}".encode()
            call_id = self._tools.call_id(hashlib.sha256(key).hexdigest())
            delta.tool_calls.add(index=found.call, id=call_id, name=found.name)
        elif not delta.tool_calls or delta.tool_calls[-1].index != found.call:
            delta.tool_calls.add(index=found.call)
        delta.tool_calls[-1].arguments += found.arguments

    def usage(self) -> types_pb2.Usage:
        """The tokens counted so far."""
        return types_pb2.Usage(
            prompt_tokens=len(self._prompt),
            completion_tokens=self.completion_tokens,
            cached_prompt_tokens=self._cached,
        )


def _mark(delta: types_pb2.SampleDelta, piece: _Piece) -> None:
    if piece.position is not None:
        delta.logprobs.append(piece.position)
    if piece.finish is not None:
        delta.finish_reason = _REASONS[piece.finish]
        delta.stop_reason = piece.stop_reason
