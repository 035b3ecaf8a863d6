"""What an operator sees while a replica loads: a bar per rank, then the account."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from .cluster.fleet import RankFacts
from .cluster.placement import MemoryPlan

MIB = 2**20
IGNORED_SHOWN = 4


class LoadingDisplay:
    """Bars on `console` until the block ends; shows nothing without a console."""

    def __init__(self, console: Console | None, replica: str) -> None:
        self._console, self._replica = console, replica
        self._tasks: dict[int, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            console=console or Console(quiet=True),
            transient=True,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def progress(self, rank: int, done: int, total: int) -> None:
        """A rank has loaded `done` of `total` weight elements; called on any thread."""
        if rank not in self._tasks:
            self._tasks[rank] = self._bars.add_task(f"{self._replica} rank {rank}", total=total)
        self._bars.update(self._tasks[rank], completed=done)

    def account(self, facts: Sequence[RankFacts], memory: MemoryPlan) -> None:
        """Print what every rank holds, to the last tensor."""
        if self._console is None:
            return
        for rank in facts:
            report = rank.report
            self._console.print(
                f"[dim]{self._replica} rank {rank.rank} on {rank.node}: {report.tensors_used} "
                f"tensors, {report.weight_bytes / MIB:.0f} MiB of weights, "
                f"{(report.kv_bytes + report.state_bytes) / MIB:.0f} MiB of KV cache, kernels {report.kernels}"
                f"{_ignored(report.tensors_ignored)}[/]",
                soft_wrap=True,
            )
        states = f", {memory.cache.num_states} states" if memory.cache.num_states else ""
        self._console.print(f"[dim]KV cache: {memory.kv_tokens} tokens{states} a replica[/]")


def _ignored(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = len(names) - IGNORED_SHOWN
    rest = f" and {more} more" if more > 0 else ""
    return f", not needed: {', '.join(names[:IGNORED_SHOWN])}{rest}"
