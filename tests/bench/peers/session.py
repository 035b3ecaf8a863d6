"""One run: set up, load, measure in alternation, say what happened."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from peers.driver import Driver, DriverFailed
from peers.environments import HERE, SetUpFailed, last_words
from peers.figures import Figures
from peers.systems import Place, System
from peers.workloads import SINGLE, Workload
from phalanx.controller.model import ServedModel

SAME_TEXT = "The capital of France is Paris. The capital of Italy is"
SAME_TOKENS = 16
RUN_S = 600.0
WARM_TOKENS = 16
SCHEDULER_S = 600.0


@dataclass(frozen=True)
class Pace:
    """How much is measured. patience_s: a run that took longer is not repeated. until: time
    (`time.monotonic()`) after which no further round begins."""

    rounds: int
    patience_s: float
    until: float


class Session:
    """Drives the drivers and keeps the figures. A system that fails is noted, and left out."""

    def __init__(
        self,
        place: Place,
        model: ServedModel,
        workloads: Sequence[Workload],
        console: Console,
        *,
        tiny: bool = False,
    ) -> None:
        self._tiny = tiny
        self._place, self._model, self._workloads = place, model, workloads
        self._console, self._seeds = console, itertools.count(1)
        self._given_up: set[tuple[str, str]] = set()
        self.figures = Figures()

    def progress(self) -> Progress:
        """Bars on the console."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )

    def set_up(self, systems: Sequence[System]) -> list[System]:
        """Those whose environment and weights are there now."""
        ready = []
        with self.progress() as bars:
            task = bars.add_task("setting up", total=len(systems))
            for system in systems:
                bars.update(task, description=f"setting up {system.name}")
                try:
                    system.set_up(self._place)
                    ready.append(system)
                except SetUpFailed as error:
                    self._fail(system.name, str(error))
                bars.advance(task)
        return ready

    def choose_form(self, forms: Sequence[System]) -> System | None:
        """The one that writes a single stream fastest, of those that run at all."""
        if len(forms) < 2:
            return forms[0] if forms else None
        seconds: dict[str, float] = {}
        for form in forms:
            try:
                driver = form.start(self._place)
                try:
                    answers = [self._timed(driver, SINGLE, seed) for seed in range(3)]
                    seconds[form.dtype] = min(answer["seconds"] for answer in answers)
                finally:
                    driver.close()
            except (SetUpFailed, DriverFailed) as error:
                self._fail(f"{form.name} {form.dtype}", str(error))
        rates = {dtype: SINGLE.output / value for dtype, value in seconds.items()}
        self.figures.forms[forms[0].name] = rates
        best = max(rates, key=rates.__getitem__, default=None)
        return next((form for form in forms if form.dtype == best), None)

    def start(self, systems: Sequence[System]) -> dict[str, tuple[System, Driver]]:
        """Load all, one after the other; each runs a little, and writes the common text on."""
        running: dict[str, tuple[System, Driver]] = {}
        with self.progress() as bars:
            task = bars.add_task("loading", total=len(systems))
            for system in systems:
                bars.update(task, description=f"loading {system.name}")
                driver = None
                try:
                    driver = system.start(self._place)
                    self._greet(system, driver)
                    running[system.name] = system, driver
                except (SetUpFailed, DriverFailed) as error:
                    self._fail(system.name, str(error))
                    if driver is not None:
                        driver.close()
                bars.advance(task)
        return running

    def _greet(self, system: System, driver: Driver) -> None:
        figures, tokens = self.figures, self._model.tokenizer.encode(SAME_TEXT).ids
        figures.facts[system.name] = driver.facts | {"dtype": system.dtype}
        figures.start_s[system.name] = driver.start_s
        job = {"prompts": [tokens], "output_tokens": SAME_TOKENS, "room": 64}
        figures.facts[system.name]["same_text"] = driver.run(job, RUN_S)["tokens"]
        for workload in self._shown(system):
            short = dataclasses.replace(workload, prompt=WARM_TOKENS, output=2, shared=0)
            [job] = self._jobs(short, 0)
            driver.run(job | {"room": workload.prompt + workload.output}, RUN_S)

    def rounds(
        self, running: dict[str, tuple[System, Driver]], order: Sequence[str], pace: Pace
    ) -> None:
        """Every workload by every system, in turn, round after round."""
        longest = 0.0
        with self.progress() as bars:
            steps = [
                (workload, name)
                for workload in self._workloads
                for name in order
                if name in running and workload in self._shown(running[name][0])
            ]
            task = bars.add_task("measuring", total=pace.rounds * len(steps))
            for number in range(pace.rounds):
                began = time.monotonic()
                if number and began + longest > pace.until:
                    self._console.print(f"[yellow]no time for more than {number} rounds[/]")
                    return
                self.figures.limits += self._limits()
                seeds = {workload.name: next(self._seeds) for workload in self._workloads}
                for workload, name in steps:
                    bars.update(task, description=f"round {number + 1}: {workload.name}, {name}")
                    if name in running and (name, workload.name) not in self._given_up:
                        self._run(running, name, workload, number, seeds[workload.name], pace)
                    bars.advance(task)
                longest = max(longest if number > 1 else 0.0, time.monotonic() - began)

    def _run(
        self,
        running: dict[str, tuple[System, Driver]],
        name: str,
        workload: Workload,
        number: int,
        seed: int,
        pace: Pace,
    ) -> None:
        driver = running[name][1]
        try:
            answer = self._timed(driver, workload, seed)
        except DriverFailed as error:
            self._fail(name, f"{workload.title}: {error}")
            running.pop(name)[1].close()
            return
        self.figures.runs[workload.name][name][number] = answer
        if answer["seconds"] > pace.patience_s:
            self._given_up.add((name, workload.name))

    def _timed(self, driver: Driver, workload: Workload, seed: int) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        for job in self._jobs(workload, seed):
            answer = driver.run(job, RUN_S)
        return answer

    def _jobs(self, workload: Workload, seed: int) -> list[dict[str, Any]]:
        workload = workload.tiny() if self._tiny else workload
        return workload.jobs(self._model.spec.vocab_size, self._model.eos_token_ids, seed)

    def _shown(self, system: System) -> list[Workload]:
        return [workload for workload in self._workloads if workload in system.workloads]

    def _limits(self) -> list[dict[str, float]]:
        """What the machine can do now; nothing where that cannot be measured."""
        command = [sys.executable, str(HERE / "drive_limits.py"), str(self._place.threads)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_S)
        return [json.loads(done.stdout)] if done.returncode == 0 else []

    def scheduler(self, running: int, queued: Sequence[int], steps: int) -> None:
        """What a step costs beyond the computation, with so many requests in line."""
        script = Path(__file__).parents[1] / "step_overhead.py"
        command = [sys.executable, str(script), "--model", self._place.model]
        command += ["--running", str(running), "--steps", str(steps), "--json"]
        log = self._place.logs / "step-overhead.log"
        with self.progress() as bars, log.open("wb") as words:
            task = bars.add_task("scheduler", total=1)
            done = subprocess.run(
                [*command, "--queued", *map(str, queued)],
                check=False,
                stdout=subprocess.PIPE,
                stderr=words,
                timeout=SCHEDULER_S,
            )
            bars.advance(task)
        if done.returncode:
            self._fail("step overhead", last_words(log))
            return
        self.figures.scheduler = json.loads(done.stdout.splitlines()[-1])

    def _fail(self, name: str, cause: str) -> None:
        self.figures.failures[name] = cause
        self._console.print(f"[red]{name}[/]: {cause}", markup=True, highlight=False)


def interleave(peers: Sequence[str], ours: Sequence[str]) -> list[str]:
    """A peer, us, a peer, us, ..., so that no two of a kind are far from each other in time."""
    pairs: Iterator[tuple[str | None, str | None]] = itertools.zip_longest(peers, ours)
    return [name for pair in pairs for name in pair if name is not None]
