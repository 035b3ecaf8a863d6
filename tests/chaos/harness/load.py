"""What clients ask for, and how they write down what they get."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.history import End, Piece, Record
from phalanx.controller.client import AsyncClient
from phalanx.protos.errors import PhalanxError, ResourceExhausted
from phalanx.protos.v1 import types_pb2

REASONS = {
    value: name.removeprefix("FINISH_REASON_").lower()
    for name, value in types_pb2.FinishReason.items()
}


@dataclass(frozen=True)
class Ask:
    """One request of a load."""

    number: int
    prompt: tuple[int, ...]
    params: dict[str, Any] = field(hash=False)

    @property
    def samples(self) -> int:
        """How many it asks for."""
        return int(self.params.get("n", 1))


def mixed(count: int, tokens: int, seed: int, prompt_tokens: int = 60) -> list[Ask]:
    """Half greedy, half drawn; penalties, stop strings, log-probabilities, several samples, and
    lengths from a half of `tokens` on; prompts of which some share a beginning."""
    draw = random.Random(seed)
    shared = tuple(draw.randrange(5, 400) for _ in range(prompt_tokens // 2))
    asks = []
    for number in range(count):
        own = tuple(draw.randrange(5, 400) for _ in range(draw.randrange(4, prompt_tokens)))
        prompt = (shared + own if number % 4 == 1 else own)[:prompt_tokens]
        length = draw.randrange(tokens // 2, tokens + 1)
        params: dict[str, Any] = {"max_tokens": length, "seed": seed + number, "ignore_eos": True}
        params["temperature"] = 0.8 if number % 2 else 0.0
        if number % 3 == 0:
            params |= {"repetition_penalty": 1.1, "frequency_penalty": 0.3, "logprobs": 2}
        if number % 8 == 3:
            params["n"] = 2
        if number % 5 == 0:
            params |= {"stop": ["e", "qu"], "min_tokens": length // 2}
        if number % 16 == 7:
            params |= {"top_k": 40, "top_p": 0.9, "no_repeat_ngram_size": 3}
        if number % 16 == 9:
            params |= {"grammar": {"regex": "([a-z]+ )+"}, "ignore_eos": False}
        asks.append(Ask(number, prompt, params))
    return asks


@dataclass
class Reading:
    """A load on its way."""

    records: list[Record]
    tasks: list[asyncio.Task[None]]
    name: str

    @property
    def tokens(self) -> int:
        """How many have come."""
        return sum(len(piece.tokens) for record in self.records for piece in record.pieces)

    @property
    def done(self) -> bool:
        """Whether all streams are over."""
        return all(task.done() for task in self.tasks)

    async def reach(self, tokens: int, timeout_s: float = 300) -> None:
        """Wait until so many tokens have come, or all is over."""
        async with asyncio.timeout(timeout_s):
            while self.tokens < tokens and not self.done:
                await asyncio.sleep(0.005)

    async def finish(self, timeout_s: float = 300) -> list[Record]:
        """The records, when all streams are over; those that are not by then stay open."""
        _, late = await asyncio.wait(self.tasks, timeout=timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return self.records


def begin(client: AsyncClient, asks: Sequence[Ask], name: str) -> Reading:
    """Ask everything at once; name: makes the ids of this run different from those of others."""
    records = [Record(ask.number, ask.samples) for ask in asks]
    tasks = [
        asyncio.create_task(read(client, ask, record, f"{name}-{ask.number}"))
        for ask, record in zip(asks, records, strict=True)
    ]
    return Reading(records, tasks, name)


async def keep_asking(
    client: AsyncClient, asks: Sequence[Ask], name: str, over: asyncio.Event
) -> list[Record]:
    """The load again and again, until it is enough; at least once."""
    records: list[Record] = []
    for turn in itertools.count():
        records += await begin(client, asks, f"{name}-{turn}").finish(500)
        if over.is_set():
            break
    return records


async def read(client: AsyncClient, ask: Ask, record: Record, request_id: str) -> None:
    """One stream, by a loop as a user writes it; everything that comes is written down."""
    record.asked_at = time.monotonic()
    try:
        async for message in client.generate(list(ask.prompt), request_id=request_id, **ask.params):
            note(record, message)
    except ResourceExhausted as error:
        record.refused = not record.pieces
        record.error = "" if record.refused else _status(error)
    except PhalanxError as error:
        record.error = _status(error)
    record.closed_at = time.monotonic()


def note(record: Record, message: Any) -> None:
    """Write down a message."""
    now = time.monotonic()
    for sample in message.samples:
        if sample.token_ids:
            tokens = tuple(sample.token_ids)
            record.pieces.append(Piece(now, sample.index, sample.first_token_index, tokens))
        if sample.finish_reason:
            record.ends.append(End(now, sample.index, REASONS[sample.finish_reason]))


def _status(error: PhalanxError) -> str:
    return f"{error.status}: {error}"
