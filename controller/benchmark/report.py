"""A benchmark's figures for people and for files: JSON, a table, and a plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from phalanx.protos.errors import ConfigError

from .load import Attempt
from .results import Results, Summary

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("phalanx", "grpcio", "protobuf", "ray", "torch", "transformers")
TIMES = {
    "time_to_first_token_s": "time to first token",
    "inter_token_latency_s": "inter-token latency",
    "time_per_output_token_s": "time per output token",
    "latency_s": "end-to-end latency",
    "send_delay_s": "client's delay",
}


def date_now() -> str:
    """Date and time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def machine_facts() -> dict[str, Any]:
    """The machine of the client, which is the server's too on a loopback address."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def software_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def check_writable(name: str, path: Path) -> None:
    """Refuse a target before hours are spent on it. Raises `ConfigError`."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{name} is {path}, allowed: a file in a folder that exists")


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The report as indented JSON."""
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def times_table(results: Results) -> Table:
    """A line for each kind of time, in milliseconds."""
    from rich.table import Table

    table = Table(title="milliseconds", title_justify="left")
    table.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    for name, title in TIMES.items():
        summary: Summary | None = getattr(results, name)
        if summary is None:
            table.add_row(title, *["-"] * 6)
            continue
        values = (summary.mean, summary.p50, summary.p90, summary.p95, summary.p99, summary.max)
        table.add_row(title, *(f"{value * 1000:.1f}" for value in values))
    return table


def totals_text(results: Results) -> str:
    """Counts and throughput, failures and short outputs included, in a few lines."""
    rates = (
        f"{results.requests_per_s:.2f} requests/s, "
        f"{results.prompt_tokens_per_s:.1f} prompt tokens/s, "
        f"{results.output_tokens_per_s:.1f} output tokens/s"
    )
    lines = [
        f"{results.completed} of {results.sent} requests completed in {results.duration_s:.2f} s",
        f"throughput: {rates}",
    ]
    if results.short:
        lines.append(f"{results.short} outputs are shorter than asked for")
    for status, error in results.errors.items():
        lines.append(f"{results.statuses[status]} failed with {status}, such as: {error}")
    return "\n".join(lines)


def require_matplotlib() -> None:
    """Raises `ConfigError` where plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plot needs matplotlib, which is not installed; install it with: "
            "pip install 'phalanx[bench]'"
        ) from None


def write_plot(path: Path, attempts: Sequence[Attempt], title: str) -> None:
    """A PNG: how times are distributed, and when tokens came. Raises `ConfigError` without
    matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    good = [item for item in attempts if item.ok]
    gaps = [value for item in good for value in item.inter_token_latencies_s()]
    firsts = [item.time_to_first_token_s or 0.0 for item in good]
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(2, 2)
    _distribution(grid[0][0], "time to first token", firsts)
    _distribution(grid[0][1], "inter-token latency", gaps)
    _distribution(grid[1][0], "end-to-end latency", [item.latency_s for item in good])
    _throughput(grid[1][1], attempts)
    figure.savefig(path, format="png", dpi=120)


def _distribution(axes: Any, title: str, values: Sequence[float]) -> None:
    """How many percent of the values are at most x."""
    ordered = sorted(values)
    shares = [100 * (index + 1) / len(ordered) for index in range(len(ordered))]
    axes.step([value * 1000 for value in ordered], shares, where="post")
    axes.set(title=title, xlabel="milliseconds", ylabel="percent at most", ylim=(0, 100))
    axes.grid(alpha=0.3)


def _throughput(axes: Any, attempts: Sequence[Attempt]) -> None:
    """Output tokens a second over time, failed requests' tokens included."""
    began = min(item.due_s for item in attempts)
    arrivals = [(time - began, count) for item in attempts for time, count in item.arrivals]
    end = max((time for time, _ in arrivals), default=1.0) or 1.0
    bins = 40
    totals = [0] * bins
    for time, count in arrivals:
        totals[min(int(time / end * bins), bins - 1)] += count
    width = end / bins
    axes.bar(
        [index * width for index in range(bins)],
        [total / width for total in totals],
        width=width,
        align="edge",
    )
    axes.set(title="output tokens/s", xlabel="seconds", ylabel="tokens/s")
    axes.grid(alpha=0.3)
