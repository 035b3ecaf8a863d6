"""Placement at full size: five policies on three traces, over a thousand modelled replicas.

    nice -n 15 python tests/bench/placement.py --output build/placement
    nice -n 15 python tests/bench/placement.py --replicas 100 --requests 100000 --output build/small

Each run is a file of the folder, and runs that have one are not done again, so that it can be
interrupted; at the end all of them are shown as a table and drawn. Times in the simulation do not
depend on the machine; decisions a second are counted in seconds of its CPU time, and need a quiet one.
Loads are, for each trace, the highest of 0.4, 0.6 and 0.8 at which some policy keeps nine requests of
ten good (found with 100 replicas on another seed).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from phalanx.controller.benchmark.report import date_now, machine_facts
from phalanx.controller.simulation.policies import POLICIES
from phalanx.controller.simulation.simulation import Setting, Simulation

LOADS = {"chat": 0.8, "shared": 0.8, "documents": 0.4}
SEED = 100
Found = dict[str, Any]


def simulate(setting: Setting, path: Path) -> Found:
    """The figures of a run, from its file if there is one."""
    if not path.exists():
        with Progress(console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task(path.stem, total=setting.requests)
            outcome = Simulation(setting).run(lambda ended: bars.update(bar, completed=ended))
        facts = {"date": date_now(), "machine": machine_facts()}
        found = facts | {"setting": msgspec.to_builtins(setting)} | outcome.figures()
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    read: Found = json.loads(path.read_text(encoding="utf-8"))
    return read


def lines(runs: list[Found]) -> list[str]:
    """A table in Markdown."""
    shown = [
        "| trace, load | placed by | first token, mean | p99 | good | hits | decisions/s, p99 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        setting = run["setting"]
        cells = (
            f"{setting['trace']}, {setting['load']:g}",
            setting["policy"],
            f"{1e3 * run['ttft_mean_s']:,.1f} ms",
            f"{1e3 * run['ttft_p99_s']:,.0f} ms",
            f"{run['good_share']:.2%}",
            f"{run['hit_rate']:.1%}",
            f"{run['decisions_per_s']:,.0f}, {1e3 * run['decision_p99_s']:.2f} ms",
        )
        shown.append(f"| {' | '.join(cells)} |")
    return shown


def draw(path: Path, runs: list[Found]) -> None:
    """Mean time to first token and good requests: a panel for each trace."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(LOADS), 5.2), layout="constrained")
    panels = figure.subplots(2, len(LOADS), squeeze=False)
    for column, (trace, load) in enumerate(LOADS.items()):
        of_trace = [run for run in runs if run["setting"]["trace"] == trace]
        names = [run["setting"]["policy"] for run in of_trace]
        colours = ["tab:blue" if name == "ours" else "lightgray" for name in names]
        for row, key in enumerate(("ttft_mean_s", "good_share")):
            panel, values = panels[row][column], [run[key] for run in of_trace]
            bars = panel.barh(names, values, color=colours)
            texts = [f"{value:.1%}" if row else f"{value:.3g} s" for value in values]
            panel.bar_label(bars, texts, padding=3)
            panel.invert_yaxis()
            panel.set_xlabel("good requests" if row else "mean time to first token")
            if row:
                panel.set_xlim(0, 1.3)
            else:
                panel.set(title=f"{trace}, load {load:g}", xscale="log", xlim=(0.005, 500))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate what is missing, show and draw all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--trace", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = []
    for trace in options.trace:
        for policy in options.policy:
            setting = Setting(policy, trace, options.replicas, options.requests, LOADS[trace], SEED)
            runs.append(simulate(setting, options.output / f"{trace}-{policy}.json"))
    table = "\n".join(lines(runs))
    Console().print(table, soft_wrap=True)
    (options.output / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(options.output / "placement.png", runs)


if __name__ == "__main__":
    main()
