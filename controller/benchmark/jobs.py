"""From settings to the requests of one run: prompts as token ids, lengths, and when each is due."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.protos.errors import ConfigError

from .formats import TRACE_BLOCK_TOKENS, Entry, Synthetic, read_workload
from .settings import Settings
from .workload import (
    Job,
    Length,
    Turn,
    choose,
    draw_lengths,
    make_jobs,
    poisson_arrivals,
    read_recorded,
)

if TYPE_CHECKING:
    from phalanx.controller.client import AsyncClient


@dataclass(frozen=True)
class Planned:
    """Requests that warm up, those that are measured, and when these are due (None: as others
    end); `skipped` recorded ones do not fit the served context."""

    warm: Sequence[Job]
    measured: Sequence[Job]
    arrivals: Sequence[float] | None
    mode: str
    """closed, open, or trace."""
    skipped: int = 0


async def plan(client: AsyncClient, settings: Settings, info: Any) -> Planned:
    """All requests of a run. info: what the server says of its model.

    Raises `ConfigError` for lengths that the model's context does not hold.
    """
    if settings.workload is not None:
        return await _of_workload(client, settings, info)
    lengths, skipped = await _lengths(client, settings, info.max_context)
    jobs = make_jobs(lengths, info.vocab_size, set(info.eos_token_ids), settings.seed)
    warm, measured = jobs[: settings.warmups], jobs[settings.warmups :]
    return Planned(warm, measured, *_when(settings, len(measured)), skipped=skipped)


def _when(settings: Settings, count: int) -> tuple[list[float] | None, str]:
    if settings.rate is None:
        return None, "closed"
    return poisson_arrivals(settings.rate, count, settings.seed), "open"


async def _of_workload(client: AsyncClient, settings: Settings, info: Any) -> Planned:
    """In the workload's own order. Warm-up prompts have its lengths and none of its tokens, so that
    they leave nothing in a cache that it would find."""
    found = read_workload(str(settings.workload))
    if isinstance(found, Synthetic):
        found = found.draw(settings.requests, settings.seed)
    writer = PromptWriter(info.vocab_size, set(info.eos_token_ids), settings.seed)
    fitting: list[tuple[Entry, Job]] = []
    skipped = 0
    for entry in found:
        if len(fitting) == settings.requests:
            break
        job = await _job(client, writer, entry)
        if len(job.prompt) + job.output_tokens > info.max_context:
            skipped += 1
        else:
            fitting.append((entry, job))
    if not fitting:
        raise ConfigError(
            f"workload is {settings.workload}, none of whose {skipped} entries fits the served "
            f"context of {info.max_context} tokens"
        )
    measured = [job for _, job in fitting]
    lengths = [Length(len(job.prompt), job.output_tokens) for job in measured]
    few = choose(lengths, settings.warmups, settings.seed)
    warm = make_jobs(few, info.vocab_size, set(info.eos_token_ids), settings.seed)
    times = [entry.time_s for entry, _ in fitting if entry.time_s is not None]
    if not times:
        return Planned(warm, measured, *_when(settings, len(measured)), skipped=skipped)
    if settings.rate is not None:
        raise ConfigError(f"rate is {settings.rate:g}, allowed without a workload of timestamps")
    arrivals = [(time - times[0]) / settings.speed for time in times]
    return Planned(warm, measured, arrivals, "trace", skipped)


async def _job(client: AsyncClient, writer: PromptWriter, entry: Entry) -> Job:
    if isinstance(entry.prompt, str):
        prompt: Sequence[int] = await client.tokenize(entry.prompt) or writer.random(1)
    else:
        prompt = writer.blocks(entry.blocks, entry.prompt)
    if isinstance(entry.output, str):
        return Job(prompt, max(1, len(await client.tokenize(entry.output))))
    return Job(prompt, entry.output)


class PromptWriter:
    """Makes prompts of random tokens; a block of a trace has the same tokens wherever it comes."""

    def __init__(self, vocab_size: int, excluded: Collection[int], seed: int) -> None:
        self._allowed = [token for token in range(vocab_size) if token not in excluded]
        self._seed, self._source = seed, random.Random(f"workload {seed}")

    def random(self, count: int) -> list[int]:
        """Tokens that no other prompt begins with, but by chance."""
        return self._source.choices(self._allowed, k=count)

    def blocks(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` tokens: those of the blocks, and random ones where the blocks end."""
        tokens: list[int] = []
        for block in ids:
            if len(tokens) >= count:
                break
            own = random.Random(f"block {self._seed} {block}")
            tokens += own.choices(self._allowed, k=TRACE_BLOCK_TOKENS)
        return tokens[:count] + self.random(max(0, count - len(tokens)))


async def _lengths(
    client: AsyncClient, settings: Settings, max_context: int
) -> tuple[list[Length], int]:
    """Lengths of all requests, warm-up first, and how many recorded ones are too long."""
    count = settings.warmups + settings.requests
    prompt, output = settings.spans()
    if settings.lengths is None:
        if prompt.high + output.high > max_context:
            raise ConfigError(
                f"prompt_tokens and output_tokens come to {prompt.high + output.high}, allowed "
                f"together: {max_context}, the served context"
            )
        return draw_lengths(prompt, output, count, settings.seed), 0
    recorded = [
        await _count_tokens(client, entry) if isinstance(entry, Turn) else entry
        for entry in read_recorded(Path(settings.lengths))
    ]
    fitting = [item for item in recorded if item.prompt + item.output <= max_context]
    if not fitting:
        raise ConfigError(
            f"lengths is {settings.lengths}, none of whose {len(recorded)} entries fits the "
            f"served context of {max_context} tokens"
        )
    return choose(fitting, count, settings.seed), len(recorded) - len(fitting)


async def _count_tokens(client: AsyncClient, turn: Turn) -> Length:
    prompt, output = await client.tokenize(turn.prompt), await client.tokenize(turn.output)
    return Length(max(1, len(prompt)), max(1, len(output)))
