"""Figures of simulations for people and for files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.controller.benchmark.report import date_now, machine_facts, require_matplotlib

from .simulation import Setting

if TYPE_CHECKING:
    from rich.table import Table

Run = tuple[Setting, dict[str, float]]


def tables(runs: Sequence[Run]) -> Iterator[Table]:
    """One for each trace and load, with a line for each policy."""
    from rich.table import Table

    for (trace, load), group in itertools.groupby(runs, lambda run: (run[0].trace, run[0].load)):
        shown = Table(title=f"{trace}, load {load:g}")
        shown.add_column("policy", no_wrap=True)
        for column in (
            "TTFT mean",
            "p50",
            "p99",
            "good",
            "good/s",
            "hits",
            "places/s",
            "place p99",
        ):
            shown.add_column(column, justify="right")
        for setting, found in group:
            shown.add_row(
                setting.policy,
                f"{found['ttft_mean_s']:.3f} s",
                f"{found['ttft_p50_s']:.3f} s",
                f"{found['ttft_p99_s']:.2f} s",
                f"{found['good_share']:.1%}",
                f"{found['goodput_per_s']:.0f}",
                f"{found['hit_rate']:.1%}",
                f"{found['decisions_per_s']:,.0f}",
                f"{found['decision_p99_s'] * 1e3:.2f} ms",
            )
        yield shown


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """All of it, with the machine and the date."""
    import msgspec

    return {
        "date": date_now(),
        "machine": machine_facts(),
        "runs": [{"setting": msgspec.to_builtins(setting), **found} for setting, found in runs],
    }


def write_plot(path: Path, runs: Sequence[Run]) -> None:
    """Mean time to first token and good requests over load, a column for each trace."""
    require_matplotlib()
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(setting.trace for setting, _ in runs))
    policies = list(dict.fromkeys(setting.policy for setting, _ in runs))
    figure = Figure(figsize=(4.2 * len(traces), 6.4), layout="constrained")
    grid = figure.subplots(2, len(traces), squeeze=False)
    for column, trace in enumerate(traces):
        upper, lower = grid[0][column], grid[1][column]
        for policy in policies:
            points = sorted(
                (setting.load, found["ttft_mean_s"], found["good_share"])
                for setting, found in runs
                if (setting.trace, setting.policy) == (trace, policy)
            )
            loads, first_s, good = zip(*points, strict=True)
            width = 2.4 if policy == "ours" else 1.2
            upper.plot(loads, first_s, marker="o", linewidth=width, label=policy)
            lower.plot(loads, good, marker="o", linewidth=width, label=policy)
        upper.set(title=trace, yscale="log", ylabel="mean time to first token (s)")
        lower.set(xlabel="load", ylabel="good requests (share)", ylim=(-0.02, 1.02))
    grid[0][0].legend()
    figure.savefig(path, dpi=110)
