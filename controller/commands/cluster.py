"""`phalanx bench cluster`: one workload on several layouts of a Ray cluster, and its links."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.controller.benchmark.settings import Settings
from phalanx.controller.config import RULES
from phalanx.controller.settings import load_config
from phalanx.protos.errors import ConfigError, PhalanxError

from .bench import load_flags, measure
from .flags import Connection, config_flags

if TYPE_CHECKING:
    from rich.console import Console

    from phalanx.controller.benchmark.layouts import Layout, Run

DEFAULT_LAYOUTS = ("tp=1",)
DEFAULT_SIZES = (1024, 8192, 65536, 2**20, 2**24)
SERVE_FLAGS = (
    "ray_address",
    "dtype",
    "kv_dtype",
    "device",
    "kv_tokens",
    "max_running",
    "max_context",
    "start_timeout_s",
)


@config_flags(*SERVE_FLAGS)
@load_flags
def cluster(
    settings: Settings,
    flags: dict[str, Any],
    model: Annotated[str, typer.Argument(help=RULES["model"].help)],
    layout: Annotated[
        list[str] | None,
        typer.Option(help="Such as tp=2,replicas=2,placement=SPREAD; may be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None,
    links: Annotated[bool, typer.Option(help="Measure all-reduces between nodes.")] = True,
) -> None:
    """Measure the same workload on several layouts of a Ray cluster, and the cluster's links.

    [bold]phalanx bench cluster smollm2 --layout tp=1 --layout tp=2 --layout tp=1,replicas=2[/bold]

    [bold]phalanx bench cluster smollm2 --ray-address 10.0.0.5:6379 --layout pp=2 --output report[/bold]

    Each layout is a cluster of its own, one after the other, with the same requests. The first is
    what the others are measured by: efficiency is output tokens a second and rank, beside its.
    """
    from rich.console import Console

    from phalanx.controller.benchmark.cluster_report import (
        check_folder,
        cluster_report,
        write_folder,
    )
    from phalanx.controller.benchmark.layouts import Layout
    from phalanx.controller.benchmark.report import require_matplotlib

    layouts = [Layout.parse(text) for text in layout or DEFAULT_LAYOUTS]
    for each in layouts:  # refuse wrong values before any is measured
        load_config(None, {"model": model} | flags | dict(each.fields))
    if output:
        require_matplotlib()
        check_folder(output)
    console = Console(highlight=False, soft_wrap=True)
    nodes, found = _links(flags) if links else ([], [])
    runs = [_run(model, each, flags, settings) for each in layouts]
    report = cluster_report(model, dataclasses.asdict(settings), nodes, found, runs)
    _show(console, report)
    if output:
        write_folder(output, report)
        console.print(f"report: {output / 'report.html'}, report.md, report.json")
    if any(run.error or run.report and run.report["results"]["failed"] for run in runs):
        raise typer.Exit(1)


def _links(flags: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Nodes and links as JSON values."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from phalanx.controller.cluster.ray_links import measure_links

    columns = (TextColumn("links {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, pair: str) -> None:
            bar.update(task, description=pair, completed=done, total=total)

        nodes, links = measure_links(
            flags.get("ray_address"), flags.get("device", "auto"), DEFAULT_SIZES, progress
        )
    return (
        [dataclasses.asdict(node) for node in nodes],
        [dataclasses.asdict(link) | {"bytes_per_s": link.bytes_per_s} for link in links],
    )


def _run(model: str, layout: Layout, flags: dict[str, Any], settings: Settings) -> Run:
    """Start the layout's cluster, measure, stop it. What fails is in the report; others go on."""
    from phalanx.controller.benchmark.layouts import Run
    from phalanx.controller.benchmark.served import served

    words = [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    try:
        with served(model, [*words, *layout.flags]) as address:
            connection = Connection(address=address)
            outcome = asyncio.run(measure(connection, settings, title=f"{layout.name}: "))
    except ConfigError:
        raise  # of the workload, the same for every layout
    except PhalanxError as error:
        return Run(layout=layout, report=None, error=str(error))
    return Run(layout=layout, report=outcome.report)


def _show(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table

    from phalanx.controller.benchmark.cluster_report import layouts_table, links_table

    for heads, rows in (links_table(report), layouts_table(report)):
        if not rows:
            continue
        table = Table(box=None, pad_edge=False)
        for place, head in enumerate(heads):
            right = place > 0
            table.add_column(head, justify="right" if right else "left", no_wrap=not right)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
