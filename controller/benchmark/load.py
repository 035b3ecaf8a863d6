"""Sending the requests and noting when every token came.

A *closed* loop keeps a number of requests open: the next starts when one ends, so a slow server
is asked less. An *open* loop sends each request when it is due, whatever the server does; times
count from when a request was due, not from when it could be sent, so that a stall of server or
client is charged to every request that it delays.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phalanx.protos.errors import PhalanxError
from phalanx.protos.v1 import types_pb2

from .workload import Job

if TYPE_CHECKING:
    from phalanx.controller.client import AsyncClient

OK = "OK"
ENDS = {types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH}


@dataclass(slots=True)
class Attempt:
    """One request as the client saw it. Times are in seconds of the event loop's clock."""

    due_s: float
    sent_s: float
    prompt_tokens: int
    asked_tokens: int
    end_s: float = 0.0
    status: str = OK
    """OK, the name of a gRPC status, or ABORT or INCOMPLETE for a stream that was cut short."""
    error: str = ""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time, tokens) of every message that brought tokens."""

    @property
    def ok(self) -> bool:
        """Whether it came to its proper end."""
        return self.status == OK

    @property
    def output_tokens(self) -> int:
        """Tokens received."""
        return sum(count for _, count in self.arrivals)

    @property
    def short(self) -> bool:
        """Whether it ended well with fewer tokens than asked for."""
        return self.ok and self.output_tokens < self.asked_tokens

    @property
    def time_to_first_token_s(self) -> float | None:
        """From when it was due to the first token."""
        return self.arrivals[0][0] - self.due_s if self.arrivals else None

    @property
    def latency_s(self) -> float:
        """From when it was due to the end of the stream."""
        return self.end_s - self.due_s

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time a token, over all tokens after the first message."""
        if len(self.arrivals) < 2:
            return None
        (first, before), (last, _) = self.arrivals[0], self.arrivals[-1]
        return (last - first) / (self.output_tokens - before)

    def inter_token_latencies_s(self) -> list[float]:
        """A value for each token after the first message: the gap before its message, divided by
        the tokens in it."""
        values: list[float] = []
        for (before, _), (after, count) in itertools.pairwise(self.arrivals):
            values += [(after - before) / count] * count
        return values


Done = Callable[[Attempt], None]


async def attempt(client: AsyncClient, job: Job, due: float, params: dict[str, Any]) -> Attempt:
    """Send one request and read it to its end. A refusal or failure is noted, not raised."""
    now = asyncio.get_running_loop().time
    result = Attempt(due, now(), len(job.prompt), job.output_tokens)
    ended = False
    try:
        async for message in client.generate(
            list(job.prompt), max_tokens=job.output_tokens, **params
        ):
            tokens = sum(len(sample.token_ids) for sample in message.samples)
            if tokens:
                result.arrivals.append((now(), tokens))
            for sample in message.samples:
                if sample.finish_reason in ENDS:
                    ended = True
                elif sample.finish_reason:
                    result.status = "ABORT"
        if result.ok and not ended:
            result.status, result.error = "INCOMPLETE", "the stream ended without a reason"
    except PhalanxError as error:
        result.status, result.error = error.status, str(error)
    result.end_s = now()
    return result


async def closed_loop(
    client: AsyncClient,
    jobs: Sequence[Job],
    concurrency: int,
    params: dict[str, Any],
    done: Done,
) -> list[Attempt]:
    """Send all jobs, `concurrency` at a time."""
    now = asyncio.get_running_loop().time
    waiting = iter(jobs)
    attempts: list[Attempt] = []

    async def stream() -> None:
        for job in waiting:
            result = await attempt(client, job, now(), params)
            attempts.append(result)
            done(result)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(jobs))):
            group.create_task(stream())
    return attempts


async def open_loop(
    client: AsyncClient,
    jobs: Sequence[Job],
    arrivals: Sequence[float],
    params: dict[str, Any],
    done: Done,
) -> list[Attempt]:
    """Send job i at `arrivals[i]` seconds from now, however many are still open."""
    now = asyncio.get_running_loop().time
    began = now()
    attempts: list[Attempt] = []

    async def send(job: Job, due: float) -> None:
        result = await attempt(client, job, due, params)
        attempts.append(result)
        done(result)

    async with asyncio.TaskGroup() as group:
        for job, offset in zip(jobs, arrivals, strict=True):
            await asyncio.sleep(max(0.0, began + offset - now()))
            group.create_task(send(job, began + offset))
    return attempts
