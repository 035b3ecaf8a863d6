"""What the journal costs: added latency of a token, and tokens per second, with and without it.

    python tests/bench/journal_cost.py --streams 1 16 64 --folder /var/tmp

The sessions of the service over an engine that is played: all streams get a token at a time, in
one turn of the event loop, as a step of a replica brings them. Latency is from the step to the
last of its tokens reaching its reader, steps being `--step-ms` apart; throughput is of steps that
follow each other as soon as every reader has its token. `commit` is what the thread spends on a
batch. The folder's disk is what is measured: name the one that the journal will lie on.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models

from phalanx.controller.journal.file import JournalFile
from phalanx.controller.journal.memory import MemoryJournal
from phalanx.controller.journal.writer import DurableJournal
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.controller.server.admission import Admitted
from phalanx.controller.server.engine import Engine
from phalanx.controller.server.following import LogReader
from phalanx.controller.server.sessions import Journal, Session, Sessions
from phalanx.controller.server.tokens import TokenTexts
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import SampledToken

PROMPT_TOKENS = 512
WARM_UP_STEPS = 20


class PlayedEngine:
    """Gives every stream the next token when `step` is called."""

    def __init__(self) -> None:
        self._queues: list[asyncio.Queue[list[TokenEvent]]] = []

    async def submit(self, **given: Any) -> AsyncIterator[list[TokenEvent]]:
        """See `server.engine.Engine`."""
        news: asyncio.Queue[list[TokenEvent]] = asyncio.Queue()
        self._queues.append(news)
        while True:
            yield await news.get()

    def divert(self, *given: Any) -> None:
        """See `server.engine.Engine`: events go to the iterator all the same."""

    def step(self, index: int, last: bool) -> None:
        """A token for all."""
        event = TokenEvent(
            request_id="",
            sample_index=0,
            first_index=index,
            tokens=(SampledToken(0, 1000 + index),),
            finish=FinishReason.LENGTH if last else None,
        )
        for news in self._queues:
            news.put_nowait([event])


class Readers:
    """Counts the tokens that have reached all readers."""

    def __init__(self, streams: int) -> None:
        self._streams, self._count = streams, 0
        self._all = asyncio.Event()

    async def read(self, sessions: Sessions, session: Session) -> None:
        """One reader."""
        log, news = LogReader(session), asyncio.Event()
        with sessions.reading(session, news.set):
            while not session.complete or not log.at_end:
                self._count += len(log.next())
                if self._count >= self._streams:
                    self._all.set()
                if log.at_end:
                    await news.wait()
                    news.clear()

    async def step(self) -> None:
        """Return when everybody has got one more token."""
        await self._all.wait()
        self._count -= self._streams
        self._all.clear()


async def run(journal: Journal, streams: int, steps: int, step_s: float) -> list[float]:
    """Seconds from each step to the last reader."""
    engine, readers = PlayedEngine(), Readers(streams)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    sessions = Sessions(cast("Engine", engine), journal, TokenTexts(tokenizer))
    times: list[float] = []
    async with asyncio.TaskGroup() as tasks:
        for number in range(streams):
            prompt = list(range(PROMPT_TOKENS))
            asked = Admitted(f"{step_s}-{number}", prompt, SamplingParams(), fingerprint=b"f" * 32)
            session = sessions.open(asked, "bench", None)
            tasks.create_task(readers.read(sessions, session))
        await asyncio.sleep(0.1)
        for index in range(steps):
            began = time.perf_counter()
            engine.step(index, index == steps - 1)
            await readers.step()
            times.append(time.perf_counter() - began)
            await asyncio.sleep(max(step_s - times[-1], 0.0) if step_s else 0.0)
    return times[WARM_UP_STEPS:]


async def measure(kind: str, folder: Path, streams: int, options: argparse.Namespace) -> list[str]:
    """One line of the table."""
    commits: list[float] = []
    journal: MemoryJournal | DurableJournal = MemoryJournal()
    if kind != "off":
        file = JournalFile(
            folder / f"{kind}-{streams}", sync="full" if kind == "full" else "normal"
        )
        journal = DurableJournal(
            file, keep_s=60, keep_bytes=2**28, on_commit=lambda seconds, _: commits.append(seconds)
        )
        journal.adopt("bench")
    paced = np.array(await run(journal, streams, options.steps, options.step_ms / 1000)) * 1e3
    flat_out = sum(await run(journal, streams, options.steps, 0.0))
    await journal.close()
    shown = [kind, str(streams), *(f"{np.percentile(paced, at):.2f}" for at in (50, 95, 99))]
    shown.append(f"{streams * (options.steps - WARM_UP_STEPS) / flat_out:,.0f}")
    return [*shown, f"{np.median(commits) * 1e3:.2f}" if commits else "-"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, help="where the journals are made; default: /tmp")
    options = parser.parse_args()
    table = Table("journal", "streams", "p50 ms", "p95 ms", "p99 ms", "tokens/s", "commit ms")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for streams in options.streams:
            for kind in ("off", "normal", "full"):
                table.add_row(*asyncio.run(measure(kind, Path(folder), streams, options)))
    Console().print(table)


if __name__ == "__main__":
    main()
