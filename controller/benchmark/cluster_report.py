"""The report of a cluster's benchmark: JSON, Markdown, one HTML file, and plots."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phalanx.protos.errors import ConfigError

from .layouts import Run, Scaling, scaling
from .report import date_now, machine_facts, software_versions

Table = tuple[Sequence[str], list[list[str]]]
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;"
    "color-scheme:light dark}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "td,th{padding:.25rem .9rem .25rem 0;text-align:right;border-bottom:1px solid #8884}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%;background:#fff}"
)


def check_folder(path: Path) -> None:
    """Make the report's folder before hours are spent on it. Raises `ConfigError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output is {path}, which cannot be made: {error.strerror}") from None


def cluster_report(
    model: str,
    settings: dict[str, Any],
    nodes: list[dict[str, Any]],
    links: list[dict[str, Any]],
    runs: list[Run],
) -> dict[str, Any]:
    """All of it as JSON values. links: of `Link`, with `bytes_per_s`."""
    return {
        "report": 1,
        "date": date_now(),
        "model": model,
        "settings": settings,
        "client_machine": machine_facts(),
        "client_versions": software_versions(),
        "nodes": nodes,
        "links": links,
        "layouts": [_layout(item) for item in scaling(runs)],
    }


def _layout(item: Scaling) -> dict[str, Any]:
    run = item.run
    measured = run.report or {}
    return {
        "layout": run.layout.name,
        "ranks": run.layout.ranks,
        "error": run.error,
        "speedup": item.speedup,
        "efficiency": item.efficiency,
        "mode": measured.get("settings", {}).get("mode"),
        "cluster": measured.get("cluster"),
        "results": measured.get("results"),
    }


def layouts_table(report: dict[str, Any]) -> Table:
    """A line for each layout."""
    heads = ("layout", "ranks", "output tokens/s", "speedup", "efficiency", "first token p50, ms")
    rows = []
    for item in report["layouts"]:
        results = item["results"]
        if results is None:
            rows.append([item["layout"], str(item["ranks"]), item["error"], "", "", "", ""])
            continue
        first, gap = results["time_to_first_token_s"], results["inter_token_latency_s"]
        efficiency = item["efficiency"]
        rows.append(
            [
                item["layout"],
                str(item["ranks"]),
                f"{results['output_tokens_per_s']:.1f}",
                f"{item['speedup']:.2f}" if efficiency is not None else "-",
                f"{efficiency:.0%}" if efficiency is not None else "-",
                f"{first['p50'] * 1000:.1f}" if first else "-",
                f"{gap['p50'] * 1000:.1f}" if gap else "-",
            ]
        )
    return (*heads, "each further p50, ms"), rows


def links_table(report: dict[str, Any]) -> Table:
    """A line for each link and size."""
    rows = [
        [
            f"{link['first']} - {link['second']}",
            link["collectives"],
            _size(link["bytes"]),
            f"{link['seconds'] * 1e6:.1f}",
            f"{link['bytes_per_s'] / 1e9:.3f}",
        ]
        for link in report["links"]
    ]
    return ("link", "by", "bytes", "all-reduce p50, us", "GB/s"), rows


def _size(count: int) -> str:
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} B"


def _parts(report: dict[str, Any]) -> list[tuple[str, Table, str]]:
    """Title, table and plot of each part."""
    parts = [("Layouts", layouts_table(report), "layouts.png")]
    if report["links"]:
        parts.append(("All-reduces between nodes", links_table(report), "links.png"))
    return parts


def _facts(report: dict[str, Any]) -> str:
    settings = report["settings"]
    load = settings["workload"] or (
        f"{settings['prompt_tokens']} tokens in, {settings['output_tokens']} out"
    )
    nodes = ", ".join(f"{node['address']} ({node['cpus']} CPU)" for node in report["nodes"])
    done = [item for item in report["layouts"] if item["results"]]
    count = max((item["results"]["sent"] for item in done), default=settings["requests"])
    pace = f"{settings['concurrency']} at a time"
    if any(item["mode"] != "closed" for item in done):
        # more ranks cannot give more than is asked for
        pace = "at given times, so that throughput says which layouts keep up, and no more"
    return (
        f"{report['model']}, {count} requests, {pace}; {load}; "
        f"{report['date']}; nodes: {nodes or 'not looked at'}"
    )


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, with the plots beside it."""
    lines = ["# A cluster's benchmark", "", _facts(report), ""]
    for title, (heads, rows), plot in _parts(report):
        lines += [f"## {title}", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
        lines += ["", f"![{title}]({plot})", ""]
    return "\n".join(lines)


def page(report: dict[str, Any], folder: Path) -> str:
    """The report as one HTML file that holds its plots."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    parts = []
    for title, (heads, rows), plot in _parts(report):
        image = base64.b64encode((folder / plot).read_bytes()).decode()
        table = cells(heads, "th") + "".join(cells(row, "td") for row in rows)
        parts.append(
            f"<h2>{html.escape(title)}</h2><table>{table}</table>"
            f'<p><img alt="{html.escape(title)}" src="data:image/png;base64,{image}"></p>'
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>A cluster\'s benchmark</title>'
        f"<style>{STYLE}</style><h1>A cluster's benchmark</h1><p>{html.escape(_facts(report))}</p>"
        + "".join(parts)
    )


def write_folder(folder: Path, report: dict[str, Any]) -> None:
    """`report.json`, `report.md`, `report.html`, `layouts.png`, and `links.png` if any was
    measured."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    _plot_layouts(folder / "layouts.png", report)
    if report["links"]:
        _plot_links(folder / "links.png", report)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(page(report, folder), encoding="utf-8")


def _plot_layouts(path: Path, report: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    done = [item for item in report["layouts"] if item["results"]]
    names = [item["layout"].replace(",", ",\n") for item in done]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rates, shares, times = figure.subplots(1, 3)
    rates.bar(names, [item["results"]["output_tokens_per_s"] for item in done], color="#3f6f9f")
    rates.set(title="output tokens/s")
    shares.bar(names, [100 * (item["efficiency"] or 0) for item in done], color="#a4630f")
    shares.set(title="tokens/s and rank, % of the first")
    shares.axhline(100, color="#8888", linewidth=1)
    for name, key, colour in (
        ("first token", "time_to_first_token_s", "#a4630f"),
        ("each further", "inter_token_latency_s", "#3f6f9f"),
    ):
        values = [1000 * (item["results"][key] or {"p50": 0})["p50"] for item in done]
        times.plot(names, values, "o", label=name, color=colour)
    times.set(title="p50, ms", yscale="log" if done else "linear")
    times.legend()
    for axes in (rates, shares, times):
        axes.grid(alpha=0.3, axis="y")
        axes.tick_params(labelsize=8)
    figure.savefig(path, format="png", dpi=120)


def _plot_links(path: Path, report: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, rates = figure.subplots(1, 2)
    by_link: dict[str, list[dict[str, Any]]] = {}
    for link in report["links"]:
        name = f"{link['first']} - {link['second']} ({link['collectives']})"
        by_link.setdefault(name, []).append(link)
    for name, found in by_link.items():
        sizes = [link["bytes"] for link in found]
        times.loglog(sizes, [link["seconds"] * 1e6 for link in found], "o-", label=name)
        rates.loglog(sizes, [link["bytes_per_s"] / 1e9 for link in found], "o-", label=name)
    times.set(title="all-reduce, microseconds", xlabel="bytes")
    rates.set(title="all-reduce, GB/s", xlabel="bytes")
    for axes in (times, rates):
        axes.grid(alpha=0.3)
    times.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)
