"""What a client must know to go on with a broken stream, and when to give up. No sockets here."""

from __future__ import annotations

import random
import time
import uuid
from typing import Any

from phalanx.protos.errors import (
    DeadlineExceeded,
    NotFound,
    PhalanxError,
    ResourceExhausted,
    StreamLost,
    Unavailable,
)
from phalanx.protos.v1 import serving_pb2, types_pb2

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 2.0
_UNREACHED = "failed to connect to all addresses"
"""gRPC's words for a request that cannot have left."""


class Resuming:
    """One stream of a client over as many calls as it takes.

    The messages of all calls, passed through `take`, are those of one undisturbed call: nothing is
    lost, repeated or changed. After an error, `failed` says for how long to wait before the next
    call, or raises.
    """

    def __init__(
        self,
        request: Any,
        *,
        timeout: float | None,
        retries: int,
        reconnect_s: float,
        met: bool,
    ) -> None:
        """request: a `GenerateRequest` or `ChatRequest`; it gets an id if it has none. timeout:
        seconds for all calls together. retries: see `Client`. reconnect_s: seconds to try for
        since a message came; 0: not at all. met: whether the server has ever answered; one that
        has not may be no server at all."""
        if not request.request_id and reconnect_s > 0:
            request.request_id = uuid.uuid4().hex
        self._request, self._reconnect_s, self._retries = request, reconnect_s, retries
        chat = isinstance(request, serving_pb2.ChatRequest)
        self._kind = serving_pb2.ChatResponse if chat else serving_pb2.GenerateResponse
        self._method = "Chat" if chat else "Generate"
        self._ends = None if timeout is None else time.monotonic() + timeout
        self._quiet_since = time.monotonic()
        self._attempts = 0
        self._tokens: dict[int, int] = {}
        self._ended: set[int] = set()
        self._scores = 0
        self._begun = self._over = False
        self._met = met

    @property
    def request_id(self) -> str:
        """Under which the server knows the request."""
        return str(self._request.request_id)

    @property
    def lives_on(self) -> bool:
        """Whether the server would keep the request for a while if its caller just left."""
        return bool(self.request_id) and not self._over

    def call(self) -> tuple[str, Any]:
        """The name and the message of the next call."""
        if not self._begun:
            return self._method, self._request
        samples = max([self._request.params.n, 1])
        return "Resume", serving_pb2.ResumeRequest(
            request_id=self.request_id,
            next_index=[self._tokens.get(index, 0) for index in range(samples)],
            next_prompt_index=self._scores,
        )

    def left(self) -> float | None:
        """Seconds that the next call may take."""
        return None if self._ends is None else max(self._ends - time.monotonic(), 0.0)

    def take(self, message: Any) -> Any | None:
        """The message without what has come before; None when nothing is left of it."""
        self._quiet_since, self._attempts, self._met = time.monotonic(), 0, True
        if isinstance(message, serving_pb2.ResumeResponse):
            message = self._kind.FromString(message.SerializeToString())
        if self._begun:
            message.ClearField("seed")
        else:
            self._begun = True
        samples = message.samples
        known = [index for index, delta in enumerate(samples) if not self._take_delta(delta)]
        for index in reversed(known):
            del samples[index]
        over = message.HasField("usage")
        self._over = self._over or over
        scored = self._take_scores(message)
        return message if over or scored or samples else None

    def _take_scores(self, message: Any) -> bool:
        """Leave new scores of the prompt; whether there are any."""
        scores = message.prompt_logprobs
        if not scores:
            return False
        had = max(self._scores - message.first_prompt_index, 0)
        del scores[:had]
        message.first_prompt_index += had
        self._scores += len(scores)
        return bool(scores)

    def _take_delta(self, delta: types_pb2.SampleDelta) -> bool:
        """Whether the piece is new. The server sends none that is partly so."""
        index, new = delta.index, len(delta.token_ids)
        if index in self._ended:
            return False
        if new:
            count, first = self._tokens.get(index, 0), delta.first_token_index
            if first < count:
                return False
            if first > count:
                raise StreamLost(f"the stream went from token {count} to {first}")
            self._tokens[index] = count + new
        else:
            self._tokens.setdefault(index, 0)
        if delta.finish_reason:
            self._ended.add(index)
        return True

    def failed(self, error: PhalanxError) -> float:
        """Seconds to wait before the next call; raises `error`, or `StreamLost`, to end here."""
        self._attempts += 1
        if isinstance(error, ResourceExhausted):
            if self._begun or not self._retries:
                raise error from None
            self._retries -= 1
            return error.retry_after_s
        if not self._reconnect_s:
            raise error from None
        if isinstance(error, NotFound) and self._begun:
            raise self._lost("the server knows the request no more", error) from None
        unreached = _UNREACHED in str(error) and not self._met
        self._met = self._met or not unreached
        if not isinstance(error, Unavailable) or unreached:
            raise error from None
        now = time.monotonic()
        if now - self._quiet_since > self._reconnect_s:
            words = f"the server did not come back within {self._reconnect_s:g} s"
            raise self._lost(words, error) from None
        wait = min(FIRST_WAIT_S * 2.0 ** min(self._attempts - 1, 10), LONGEST_WAIT_S)
        wait = max(wait, min(error.retry_after_s or 0.0, LONGEST_WAIT_S))
        wait *= random.uniform(0.5, 1.0)
        if self._ends is not None and now + wait >= self._ends:
            raise DeadlineExceeded(f"the deadline passed while the server was away: {error}")
        return wait

    def _lost(self, words: str, error: PhalanxError) -> StreamLost:
        counts = ", ".join(str(self._tokens[index]) for index in sorted(self._tokens)) or "0"
        return StreamLost(
            f"{words}, after {self._attempts} attempts: {error}; request_id {self.request_id!r}, "
            f"of whose samples {counts} tokens have come"
        )
