"""A driver as seen from here: its process, jobs and answers, and the cores that it used."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from peers.environments import HERE, clean_environment

END_S = 30.0
OWN_LABELS = {"drive_phalanx.py": "controller", "drive_grpc.py": "client"}
"""What a driver's own process is in the report."""


class DriverFailed(Exception):
    """The system did not do what it was asked; it is not asked again."""


class Driver:
    """A system that has been loaded and waits for jobs. Raises `DriverFailed` if it does not load."""

    def __init__(
        self,
        python: Path,
        script: str,
        settings: dict[str, Any],
        log: Path,
        *,
        ours: bool,
        load_s: float,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._partial = log, b""
        self._label = OWN_LABELS.get(script, "engine")
        environment = clean_environment()
        if ours and (path := os.environ.get("PYTHONPATH")):
            environment["PYTHONPATH"] = path
        with log.open("wb") as words:
            began = time.perf_counter()
            self._process = subprocess.Popen(
                [str(python), str(HERE / script), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env=environment,
                start_new_session=True,
            )
        try:
            self.facts: dict[str, Any] = self._answer(load_s)["facts"]
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - began
        """From the start of the process to the first token."""

    def run(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a job, with `cores`: how many each of its processes kept busy, and
        `others`: how many the rest of the machine did."""
        before, machine = self._cpu(), _busy()
        began = time.perf_counter()
        if self._process.stdin is None:
            raise RuntimeError("a driver's input is not piped")
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise DriverFailed("it ended") from None
        answer = self._answer(timeout_s)
        seconds = time.perf_counter() - began
        used: Counter[str] = Counter()
        for (_, label), value in self._cpu().items():
            used[label] += value
        for (_, label), value in before.items():
            used[label] -= value
        wrong = [count for count in answer["counts"] if count != job["output_tokens"]]
        if wrong or len(answer["counts"]) != len(job["prompts"]):
            raise DriverFailed(f"it wrote {wrong[:4]} tokens instead of {job['output_tokens']}")
        answer["cores"] = {label: value / seconds for label, value in used.items()}
        rest = _busy() - machine - sum(used.values())
        answer["others"] = max(rest, 0.0) / seconds
        return answer

    def close(self) -> None:
        """Let it end, or end it."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        output = self._process.stdout
        if output is None:
            raise RuntimeError("a driver's output is not piped")
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as waiting:
            waiting.register(output, selectors.EVENT_READ)
            while b"\n" not in self._partial:
                if not waiting.select(max(deadline - time.monotonic(), 0)):
                    raise DriverFailed(f"no answer within {timeout_s:g} s")
                part = os.read(output.fileno(), 1 << 20)
                if not part:
                    code = self._process.wait()
                    raise DriverFailed(f"it ended with code {code} (its words: {self._log})")
                self._partial += part
        line, _, self._partial = self._partial.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DriverFailed(answer["error"])
        return answer

    def _cpu(self) -> dict[tuple[int, str], float]:
        """CPU seconds so far of each of its processes."""
        seconds = {}
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self._process.pid)
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    label = self._label if process.pid == own.pid else _label(process.cmdline())
                    seconds[process.pid, label] = times.user + times.system
        return seconds


def _label(words: list[str]) -> str:
    """What a child process is in the report, from its command line."""
    if "phalanx.workers.process" in words or "RankActor" in " ".join(words[:1]):
        return "ranks"
    return "controller" if "phalanx.controller" in words else "Ray"


def _busy() -> float:
    """CPU seconds of the whole machine so far."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
