"""`phalanx bench`: real requests against a cluster, and how long they took."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.controller.benchmark.settings import OPEN_LOOP_WARMUP, Settings
from phalanx.controller.config import RULES
from phalanx.protos.errors import ConfigError

from .flags import Connection, config_flags, connection_flags, gathered, parameter

if TYPE_CHECKING:
    from phalanx.controller.benchmark.session import Outcome

FILES = "Reports"
WORKLOAD = (
    "A file of vllm bench or guidellm (ShareGPT, prompts, lengths), a trace as Mooncake has them, "
    "or guidellm's text for synthetic data."
)
SERVE_HELP = f"Start a cluster just for this. {RULES['model'].help}"
SERVE_FLAGS = (
    "tp",
    "pp",
    "dtype",
    "kv_dtype",
    "device",
    "threads",
    "kv_tokens",
    "max_running",
    "collectives",
)


def _load_flags() -> list[inspect.Parameter]:
    defaults = Settings()

    def flag(name: str, kind: Any, help: str, panel: str) -> inspect.Parameter:
        default = None if name == "seed" else getattr(defaults, name)
        return parameter(name, kind, default, help=help, rich_help_panel=panel)

    load, sizes = "Load", "Sizes"
    warmup = f"Requests before them, not counted. \\[default: CONCURRENCY, open {OPEN_LOOP_WARMUP}]"
    seed = "Draws lengths, prompts and arrivals. \\[default: another one each time]"
    return [
        flag("requests", int, "Requests to measure.", load),
        flag("concurrency", int, "Closed loop: requests open at a time.", load),
        flag("rate", float | None, "Open loop: requests a second, at random (Poisson).", load),
        flag("warmup", int | None, warmup, load),
        flag("seed", int | None, seed, load),
        flag("prompt_tokens", str, "Prompt length, 128 or 64-256.", sizes),
        flag("output_tokens", str, "Output length, 64 or 16-128.", sizes),
        flag("lengths", str | None, "Recorded lengths: JSON lines or ShareGPT.", sizes),
        flag("workload", str | None, WORKLOAD, sizes),
        flag("speed", float, "How much faster the timestamps of a trace pass.", sizes),
        flag("ignore_eos", bool, "Write the full length, past the model's own end.", sizes),
        flag("temperature", float, "0 always takes the likeliest token.", sizes),
    ]


def _settings(*, seed: int | None, **values: Any) -> Settings:
    """Another seed each time, or a second run would find the prompts of the first one cached."""
    return Settings(seed=secrets.randbelow(2**31) if seed is None else seed, **values)


load_flags = gathered("settings", _load_flags(), _settings)
"""Decorator: parameter `settings` is a `Settings` made of flags."""


@config_flags(*SERVE_FLAGS)
@connection_flags
@load_flags
def bench(
    context: typer.Context,
    settings: Settings,
    connection: Connection,
    flags: dict[str, Any],
    output: Annotated[
        Path | None, typer.Option(help="Write a report, JSON.", rich_help_panel=FILES)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a plot, PNG; needs matplotlib.", rich_help_panel=FILES)
    ] = None,
    serve: Annotated[
        str | None, typer.Option(help=SERVE_HELP, rich_help_panel="Engine", metavar="MODEL")
    ] = None,
) -> None:
    """Measure a running cluster, or with --serve one of its own, through gRPC.

    [bold]phalanx bench[/bold]  64 requests, 8 at a time

    [bold]phalanx bench --rate 4 --requests 200 --prompt-tokens 32-512[/bold]  as users come

    [bold]phalanx bench kernels[/bold]  kernels alone, beside what the device reaches

    [bold]phalanx bench cluster smollm2 --layout tp=1 --layout tp=2[/bold]  layouts and links

    [bold]phalanx bench --serve smollm2 --tp 2 --output report.json --plot report.png[/bold]

    Prompts are random tokens, so that no cache helps. Times count from when a request was due.
    Exit code 1 says that requests failed; they are counted by status and not in the times.
    """
    if context.invoked_subcommand is not None:
        return
    from phalanx.controller.benchmark.report import check_writable, require_matplotlib

    if flags and serve is None:
        raise ConfigError(f"{', '.join(flags)}: allowed with --serve, which starts a cluster")
    if output:
        check_writable("output", output)
    if plot:
        check_writable("plot", plot)
        require_matplotlib()
    with _cluster(connection, serve, flags) as target:
        outcome = asyncio.run(measure(target, settings))
    show(outcome, output, plot)
    if outcome.results.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _cluster(connection: Connection, model: str | None, flags: dict[str, Any]) -> Any:
    """The connection to use: the given one, or one to a cluster started for this."""
    if model is None:
        yield connection
        return
    from phalanx.controller.benchmark.served import served

    words = [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    with served(model, words) as address:
        yield dataclasses.replace(connection, address=address, token_file=None, tls_ca=None)


async def measure(connection: Connection, settings: Settings, *, title: str = "") -> Outcome:
    """Run it under a progress bar, whose stages are named after `title`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from phalanx.controller.wakeups import read_plainly

    read_plainly()
    from phalanx.controller.benchmark.load import Attempt, Done
    from phalanx.controller.benchmark.session import run_benchmark
    from phalanx.controller.client import AsyncClient

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def stage(name: str, total: int) -> Done:
            task, failed = bar.add_task(title + name, total=total, failed=0), 0

            def done(item: Attempt) -> None:
                nonlocal failed
                failed += not item.ok
                bar.update(task, advance=1, failed=failed)

            return done

        async with AsyncClient(**connection.arguments()) as client:
            return await run_benchmark(client, settings, stage)


def show(outcome: Outcome, output: Path | None, plot: Path | None) -> None:
    """Print the figures, then write the files."""
    from rich.console import Console

    from phalanx.controller.benchmark.report import (
        times_table,
        totals_text,
        write_plot,
        write_report,
    )

    console = Console(highlight=False, soft_wrap=True)
    console.print(times_table(outcome.results))
    console.print(totals_text(outcome.results), markup=False)
    if outcome.report["skipped_too_long"]:
        console.print(f"{outcome.report['skipped_too_long']} recorded lengths exceed the context")
    if output:
        write_report(output, outcome.report)
        console.print(f"report: {output}")
    if plot:
        settings = outcome.report["settings"]
        loads = {
            "closed": f"{settings['concurrency']} at a time",
            "open": f"{settings['rate']} requests/s",
            "trace": f"trace at {settings['speed']:g} times its speed",
        }
        load = loads[settings["mode"]]
        write_plot(plot, outcome.attempts, f"{outcome.report['model']['name']}, {load}")
        console.print(f"plot: {plot}")
