"""The report: JSON with every run, a page of tables, and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from peers.figures import BFLOAT16, INT8, Figures, Value, goals
from peers.workloads import ALL, FIRST, Workload
from phalanx.controller.benchmark.report import date_now, machine_facts, software_versions

SPLIT = ("single", "streams")


def write(folder: Path, figures: Figures, settings: Mapping[str, Any], load: float) -> None:
    """report.json, report.md and report.png."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "date": date_now(),
        "settings": {name: _plain(value) for name, value in settings.items()},
        "machine": machine_facts() | {"load_before": load},
        "versions": software_versions(),
    }
    reached = [
        {"goal": goal.text, "wanted": goal.wanted, "reached": goal.reached, "met": goal.met}
        for goal in goals(figures)
    ]
    values = vars(figures) | {"goals": reached}
    (folder / "report.json").write_text(json.dumps(about | values, indent=1) + "\n", "utf-8")
    lines = [*_head(about, figures), *_goals(figures), *_tables(figures), *_notes(figures)]
    (folder / "report.md").write_text("\n".join(lines) + "\n", "utf-8")
    _plot(folder / "report.png", figures)


def show(figures: Figures, console: Console) -> None:
    """The goals and the tables, on the console."""
    console.print(Markdown("\n".join([*_goals(figures), *_tables(figures), *_notes(figures)])))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _number(value: Value, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _large(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _head(about: dict[str, Any], figures: Figures) -> Iterator[str]:
    machine = about["machine"]
    yield "# Phalanx beside its peers"
    yield ""
    yield (
        f"{about['date']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, load before {machine['load_before']:.2f}. "
        "SmolLM2-135M-Instruct, greedy. Medians over the rounds; ratios are medians of the ratios "
        "within a round."
    )
    read, flops = figures.limit("read_bytes_per_s"), figures.limit("bfloat16_flops")
    if read and flops:
        yield (
            f"The machine reads {read / 1e9:.1f} GB/s and multiplies bfloat16 matrices at "
            f"{flops / 1e12:.2f} TFLOP/s (the best of {len(figures.limits)} looks)."
        )
    yield ""


def _goals(figures: Figures) -> Iterator[str]:
    yield _row("goal", "wanted", "reached", "")
    yield _row("---", "---", "---", "---")
    for goal in goals(figures):
        sign = ">=" if goal.least else "<="
        verdict = {None: "not measured", True: "met", False: "**missed**"}[goal.met]
        yield _row(goal.text, f"{sign} {goal.wanted:g}", _number(goal.reached, 3), verdict)
    yield ""


def _tables(figures: Figures) -> Iterator[str]:
    for workload in ALL:
        systems = figures.runs.get(workload.name)
        if not systems:
            continue
        yield f"{workload.title}: {workload.metric}"
        yield ""
        yield _row("", "median", "min", "max", "rounds", "bfloat16 ÷ it", "int8 ÷ it")
        yield _row(*["---"] * 7)
        for name in sorted(systems, key=_ours):
            values = sorted(figures.values(workload, name).values())
            median = figures.median(workload, name) or 0.0
            yield _row(
                f"{name} ({figures.facts.get(name, {}).get('dtype', '?')})",
                _large(median),
                _large(values[0]),
                _large(values[-1]),
                len(values),
                _number(figures.ratio(workload, BFLOAT16, name)),
                _number(figures.ratio(workload, INT8, name)),
            )
        yield ""


def _notes(figures: Figures) -> Iterator[str]:
    yield from _cores(figures)
    yield "Start of the process to the first token, seconds: " + (
        ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures.start_s.items())
    )
    yield ""
    for name, rates in figures.forms.items():
        shown = ", ".join(f"{form} {rate:.0f}" for form, rate in rates.items())
        yield f"Forms of {name}, single stream, tokens/s; the fastest was measured: {shown}"
        yield ""
    texts = {name: facts.get("same_text", []) for name, facts in figures.facts.items()}
    if reference := texts.get("transformers") or texts.get(BFLOAT16):
        same = {name: _shared_start(reference, tokens) for name, tokens in texts.items()}
        shown = ", ".join(f"{name} {count}" for name, count in same.items())
        yield f"Greedy tokens of one text, of {len(reference)}, that are the same: {shown}"
        yield ""
    for row in figures.scheduler:
        yield (
            f"Step overhead, {row['running']} running, {row['queued']} queued: p50 "
            f"{row['overhead_p50_ms']:.3f} ms, p99 {row['overhead_p99_ms']:.3f} ms beside "
            f"{row['execute_p50_ms']:.1f} ms of computation, {row['steps']} steps"
        )
        yield ""
    for name, cause in figures.failures.items():
        yield f"Not measured: {name}: {cause}"
        yield ""


def _cores(figures: Figures) -> Iterator[str]:
    """Who kept how many cores busy."""
    yield _row("cores kept busy", *SPLIT, "others at most")
    yield _row(*["---"] * (2 + len(SPLIT)))
    for name in sorted(figures.facts, key=_ours):
        cells, others = [], 0.0
        for workload in SPLIT:
            answers = list(figures.runs.get(workload, {}).get(name, {}).values())
            labels = {label: 0.0 for answer in answers for label in answer["cores"]}
            for answer in answers:
                others = max(others, answer["others"])
                for label, used in answer["cores"].items():
                    labels[label] += used / len(answers)
            cells.append(", ".join(f"{label} {used:.2f}" for label, used in labels.items()))
        yield _row(name, *cells, f"{others:.2f}")
    yield ""


def _ours(name: str) -> bool:
    """Sorts peers before ourselves, and leaves the order as it is else."""
    return name.startswith("phalanx")


def _shared_start(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next(
        (at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other))
    )


def _plot(path: Path, figures: Figures) -> None:
    """A bar for each system and workload, with the range over the rounds."""
    from matplotlib.figure import Figure

    shown = [workload for workload in ALL if figures.runs.get(workload.name)]
    if not shown:
        return
    figure = Figure(figsize=(13, 4 * ((len(shown) + 1) // 2)), layout="constrained")
    for axes, workload in zip(figure.subplots(-(-len(shown) // 2), 2).flat, shown, strict=False):
        _bars(axes, figures, workload)
    figure.savefig(path, format="png", dpi=110)


def _bars(axes: Any, figures: Figures, workload: Workload) -> None:
    names = sorted(figures.runs[workload.name], key=_ours)[::-1]
    medians = [figures.median(workload, name) or 0.0 for name in names]
    ranges = [sorted(figures.values(workload, name).values()) for name in names]
    errors = [
        [median - values[0] for median, values in zip(medians, ranges, strict=True)],
        [values[-1] - median for median, values in zip(medians, ranges, strict=True)],
    ]
    colours = ["tab:blue" if _ours(name) else "tab:gray" for name in names]
    axes.barh(names, medians, xerr=errors, color=colours, ecolor="black", capsize=3)
    for place, (median, values) in enumerate(zip(medians, ranges, strict=True)):
        axes.text(values[-1], place, f"  {_large(median)}", va="center")
    less = " (less is better)" if workload.metric == FIRST else ""
    axes.set(title=workload.title, xlabel=f"{workload.metric}{less}")
    axes.margins(x=0.22)
    axes.grid(axis="x", alpha=0.3)
