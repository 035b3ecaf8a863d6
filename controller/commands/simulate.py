"""`phalanx simulate`: the scheduler over modelled replicas."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from phalanx.controller.simulation.report import Run
    from phalanx.controller.simulation.simulation import Setting


def simulate(
    trace: Annotated[
        list[str] | None, typer.Option(help="chat, shared or documents; all by default.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="ours, round-robin, least-loaded, prefix-hash or cache-aware; all by default."
        ),
    ] = None,
    load: Annotated[
        list[float] | None,
        typer.Option(
            help="Arrivals, as a part of what could be served if nothing were computed twice."
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, max=100_000, help="Modelled replicas.")] = 100,
    requests: Annotated[int, typer.Option(min=100, help="Requests of each run.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Of the traces.")] = 0,
    profile: Annotated[
        Path | None, typer.Option(help="JSON file with a replica's measured step times.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them, as PNG or SVG.")] = None,
) -> None:
    """Compare ways to place requests, with this cluster's own scheduler among them.

    [bold]phalanx simulate[/bold]  every policy on every trace, 100 replicas, some minutes

    [bold]phalanx simulate --trace chat --policy ours --replicas 1000 --requests 1000000[/bold]

    The replicas are models with the step times of a profile; placement, prefix index and learned
    lengths are the very code that serves. Deterministic but for the decisions' own times.
    """
    from rich.console import Console

    from phalanx.controller.benchmark.report import require_matplotlib
    from phalanx.controller.simulation.policies import POLICIES
    from phalanx.controller.simulation.profile import read_profile
    from phalanx.controller.simulation.report import as_json, tables, write_plot
    from phalanx.controller.simulation.simulation import GOOD, Setting
    from phalanx.controller.simulation.traces import TRACES

    _check(trace, policy, load)
    if plot is not None:
        require_matplotlib()
    grid = itertools.product(trace or TRACES, load or [0.4], policy or POLICIES)
    model = read_profile(profile)
    runs = _run([Setting(c, a, replicas, requests, b, seed, model) for a, b, c in grid])
    console = Console()
    for shown in tables(runs):
        console.print(shown)
    console.print(GOOD)
    if output is not None:
        output.write_text(json.dumps(as_json(runs), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        write_plot(plot, runs)


def _check(
    traces: Sequence[str] | None, policies: Sequence[str] | None, loads: Sequence[float] | None
) -> None:
    from phalanx.controller.simulation.policies import check_policy
    from phalanx.controller.simulation.simulation import check_load
    from phalanx.controller.simulation.traces import check_trace

    for trace in traces or ():
        check_trace(trace)
    for policy in policies or ():
        check_policy(policy)
    for load in loads or ():
        check_load(load)


def _run(settings: Sequence[Setting]) -> list[Run]:
    """All of them, one after the other, with a bar each."""
    from rich.console import Console
    from rich.progress import Progress

    from phalanx.controller.simulation.simulation import Simulation

    runs: list[Run] = []
    with Progress(console=Console(stderr=True), transient=True) as bars:
        for setting in settings:
            title = f"{setting.trace}, load {setting.load:g}, {setting.policy}"
            bar = bars.add_task(title, total=setting.requests)
            outcome = Simulation(setting).run(partial(_advance, bars, bar))
            bars.remove_task(bar)
            runs.append((setting, outcome.figures()))
    return runs


def _advance(bars: Progress, bar: TaskID, ended: int) -> None:
    bars.update(bar, completed=ended)
