"""An engine whose tokens come when the test lets them, and readers of what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from phalanx.controller.client import AsyncClient
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.steps import SampledToken, TokenLogprob
from phalanx.protos.v1 import serving_pb2

Batches = AsyncIterator[list[TokenEvent]]


class Pacer:
    """A script whose tokens come when the test lets them: token i of a sample is 50 + i."""

    def __init__(self, tokens: int = 10) -> None:
        self.tokens, self.allowed = tokens, 0
        self._news = asyncio.Event()

    def allow(self, count: int) -> None:
        self.allowed = count
        self._news.set()
        self._news = asyncio.Event()

    async def __call__(self, submission: Any) -> Batches:
        known = submission.known or {index: () for index in range(submission.params.n)}
        for first in range(min(map(len, known.values())), self.tokens):
            while first >= self.allowed:
                await self._news.wait()
            last = {"finish": FinishReason.LENGTH} if first + 1 == self.tokens else {}
            yield [
                submission.event([self.token(first)], first, sample_index=index, **last)
                for index in known
                if first >= len(known[index])
            ]

    @staticmethod
    def token(first: int) -> SampledToken:
        score = TokenLogprob(50 + first, -0.5 - first, 1)
        return SampledToken(seq=0, token_id=50 + first, logprob=score, top=[score])


@pytest.fixture
def pacer() -> Callable[..., Pacer]:
    """Factory: `pacer(tokens)`."""
    return Pacer


@pytest.fixture
def play() -> Callable[[Callable[[], Coroutine[Any, Any, None]]], None]:
    """Run a test's work on an event loop, and not for ever."""
    return lambda work: asyncio.run(asyncio.wait_for(work(), 40))


async def _read_tokens(stream: Any, count: int) -> None:
    """Read until so many tokens of sample 0 have come."""
    while count > 0:
        count -= len((await anext(stream)).samples[0].token_ids)


async def _resumed(client: AsyncClient, request_id: str, *next_index: int) -> Any:
    """(tokens, text, log-probabilities, usage) of sample 0, as `Resume` gives them."""
    request = serving_pb2.ResumeRequest(request_id=request_id, next_index=next_index)
    tokens, text, scores, usage = [], "", [], None
    async for message in client._stub.Resume(request, timeout=10, metadata=client._metadata):
        for sample in message.samples:
            if sample.index == 0:
                tokens += sample.token_ids
                text += sample.text
                scores += [item.token.logprob for item in sample.logprobs]
        usage = message.usage if message.HasField("usage") else usage
    return tokens, text, scores, usage


@pytest.fixture
def read_tokens() -> Any:
    """`await read_tokens(stream, count)`."""
    return _read_tokens


@pytest.fixture
def resumed() -> Any:
    """`await resumed(client, request_id, *next_index)`."""
    return _resumed
