"""Phalanx beside vLLM, llama.cpp, OpenVINO GenAI and transformers: same weights, same work, one run.

    python tests/bench/peers/run.py
    python tests/bench/peers/run.py --rounds 1 --peers vllm --workloads single streams

The first time, every peer is installed in a virtual environment of its own. Then all are loaded,
and do the same work in turn, round after round; ratios are those of the same round. The machine
should have nothing else to do. The report is a folder: report.md, report.json, report.png.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from peers import report, workloads
from peers.figures import BFLOAT16, SERVED, Figures
from peers.session import Pace, Session, interleave
from peers.systems import PEERS, Place, System, offline, served
from phalanx.controller.benchmark.report import require_matplotlib
from phalanx.controller.model import ServedModel, find_smollm2, resolve_model

BUILD = Path("build")
SERVICE = (workloads.SINGLE, workloads.STREAMS)
RESERVE_S = 240.0
"""What comes after the rounds takes about so long."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [workload.name for workload in workloads.ALL]
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    parser.add_argument(
        "--ours",
        nargs="*",
        default=["bfloat16:1", "int8:1", "bfloat16:2", "int8:2"],
        metavar="DTYPE:TP",
        help="forms of Phalanx; the first ones stand nearest to the first peers",
    )
    parser.add_argument(
        "--engine", nargs="*", default=[], metavar="NAME=VALUE", help="settings of all of our forms"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=25, help="no round begins that would end later"
    )
    parser.add_argument(
        "--patience", type=float, default=15, help="a run of more seconds is not repeated"
    )
    parser.add_argument("--service-rounds", type=int, default=3, help="gRPC beside offline; 0: not")
    parser.add_argument("--scheduler-steps", type=int, default=200, help="0: not measured")
    parser.add_argument("--venvs", type=Path, default=BUILD / "peers", help="peers and weights")
    parser.add_argument("--output", type=Path, default=BUILD / "peers-report")
    parser.add_argument(
        "--tiny", action="store_true", help="a few tokens of everything: to try the command out"
    )
    parser.add_argument("--set-up-only", action="store_true", help="install and convert, then end")
    return parser.parse_args()


def our_systems(options: argparse.Namespace) -> list[System]:
    """The forms of Phalanx that were asked for."""
    extra = settings(options.engine)
    forms = [form.rpartition(":") for form in options.ours]
    return [offline(dtype, int(tp), extra) for dtype, _, tp in forms]


def settings(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE, numbers as numbers."""
    pairs = [word.partition("=") for word in words]
    return {name: int(value) if value.isdigit() else value for name, _, value in pairs}


def make_session(options: argparse.Namespace, model: ServedModel, console: Console) -> Session:
    """Where it runs, and what it is asked."""
    place = Place(
        model="smollm2",
        gguf=find_smollm2(),
        venvs=options.venvs.absolute(),
        logs=options.output.absolute() / "logs",
        threads=len(os.sched_getaffinity(0)),
    )
    place.logs.mkdir(parents=True, exist_ok=True)
    chosen = [item for item in workloads.ALL if item.name in options.workloads]
    return Session(place, model, chosen, console, tiny=options.tiny)


def measure_peers(session: Session, options: argparse.Namespace, until: float) -> None:
    """The peers and ourselves without a server, in turn."""
    ours = our_systems(options)
    ready = session.set_up([form for name in options.peers for form in PEERS[name]] + ours)
    if options.set_up_only:
        return
    peers = [
        chosen
        for name in options.peers
        if (chosen := session.choose_form([form for form in PEERS[name] if form in ready]))
    ]
    running = session.start([*peers, *ours])
    try:
        order = interleave([item.name for item in peers], [item.name for item in ours])
        session.rounds(running, order, Pace(options.rounds, options.patience, until))
    finally:
        for _, driver in running.values():
            driver.close()


def measure_service(session: Session, options: argparse.Namespace) -> None:
    """Ourselves as a server, and without one, in turn. Peers are gone: Ray is never quite idle."""
    extra = settings(options.engine)
    pair = [offline("bfloat16", 1, extra), served("bfloat16", 1, extra)]
    pair = [
        System(
            f"{BFLOAT16}, beside gRPC" if item.script == "drive_phalanx.py" else SERVED,
            item.script,
            None,
            item.prepare,
            SERVICE,
        )
        for item in pair
    ]
    running = session.start(pair)
    try:
        names = [item.name for item in pair]
        pace = Pace(options.service_rounds, float("inf"), float("inf"))
        session.rounds(running, names, pace)
    finally:
        for _, driver in running.values():
            driver.close()


def main() -> None:
    """Measure what was asked for, and write the report after each part, so that none is lost."""
    options, console = arguments(), Console()
    began = time.monotonic()
    require_matplotlib()
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 4:
        console.print(f"[red]this machine is busy[/]: load {load:.1f} on {cores} cores")
    session = make_session(options, resolve_model("smollm2"), console)

    def write() -> Figures:
        taken = time.monotonic() - began
        report.write(options.output, session.figures, vars(options) | {"seconds": taken}, load)
        return session.figures

    measure_peers(session, options, began + 60 * options.minutes - RESERVE_S)
    if options.set_up_only:
        return
    write()
    if options.service_rounds:
        measure_service(session, options)
        write()
    if options.scheduler_steps:
        running, queued = (8, 100) if options.tiny else (256, 10_000)
        session.scheduler(running, (0, queued), options.scheduler_steps)
    report.show(write(), console)
    console.print(f"{options.output / 'report.md'} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
