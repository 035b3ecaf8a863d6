"""A clock that jumps, and a server that answers by it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from phalanx.protos.v1 import serving_pb2, types_pb2


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        loop, self.now = self, 0.0

        class Selector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                loop.now += timeout or 0.0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self.now


@pytest.fixture
def jump() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """`jump(coroutine)`: its result, with all waiting skipped and exact times."""

    def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            return runner.run(coroutine)

    return run


class FakeServer:
    """Answers one request at a time: `first_s` seconds to the first token, `next_s` to the others,
    in messages of `chunk` tokens. `fail(number)` may give an exception to raise for a request."""

    def __init__(self, first_s: float = 1.0, next_s: float = 0.5, chunk: int = 1) -> None:
        self.first_s, self.next_s, self.chunk = first_s, next_s, chunk
        self.serial = asyncio.Semaphore(1)
        self.open = self.most_open = 0
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.fail: Callable[[int], Exception | None] = lambda number: None
        self.last = types_pb2.FINISH_REASON_LENGTH

    def parallel(self, slots: int) -> FakeServer:
        """Answer so many at a time."""
        self.serial = asyncio.Semaphore(slots)
        return self

    async def generate(
        self, prompt: list[int], *, max_tokens: int, **params: Any
    ) -> AsyncIterator[Any]:
        number = len(self.asked)
        self.asked.append((prompt, {"max_tokens": max_tokens} | params))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            async with self.serial:
                await asyncio.sleep(self.first_s)
                error = self.fail(number)
                if error is not None:
                    raise error
                left = max_tokens
                while left:
                    count = min(self.chunk, left)
                    left -= count
                    sample = types_pb2.SampleDelta(token_ids=[7] * count)
                    if not left:
                        sample.finish_reason = self.last
                    yield serving_pb2.GenerateResponse(samples=[sample])
                    if left:
                        await asyncio.sleep(self.next_s)
        finally:
            self.open -= 1

    async def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    async def model_info(self) -> Any:
        return serving_pb2.GetModelInfoResponse(
            name="tiny", vocab_size=40, max_context=512, eos_token_ids=[2, 3]
        )

    async def cluster_state(self) -> Any:
        replica = types_pb2.ReplicaState(replica_id="replica-0", state="ready")
        return serving_pb2.GetClusterStateResponse(replicas=[replica])


@pytest.fixture
def server() -> Callable[..., FakeServer]:
    """Factory of fake servers."""
    return FakeServer
