"""`phalanx serve` as a process of its own: started, watched, harmed and ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.history import Remains
from phalanx.protos.failpoints import FLAG

MARK = "PHALANX_CHAOS_MARK"
SERVE = "from phalanx.controller.cli import main; main()"
GROUPS = Path("/sys/fs/cgroup/memory")
START_S = 240.0
END_S = 60.0
RAYLET = re.compile(r"--raylet_socket_name=(.+)/raylet.*")
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@dataclass(frozen=True)
class Topology:
    """What is served, by what."""

    model: str = "tiny"
    """"tiny", of random weights, or a name or path that `phalanx serve` takes."""
    tp: int = 2
    replicas: int = 1
    flags: tuple[str, ...] = ("--collectives", "gloo")
    journal: bool = True
    in_memory_group: bool = False
    """Whether all its processes are in a control group for memory; needs root and its version 1."""
    prelude: str = ""
    """Python that the process runs before it serves: for guards that tests switch off."""


class Server:
    """One cluster. Ranks are known by the word that they leave with the failpoints."""

    def __init__(self, folder: Path, model: str, topology: Topology) -> None:
        self.topology, self._folder = topology, folder
        self.points = folder / "points"
        self.points.mkdir()
        self.mark = uuid.uuid4().hex
        self.said: list[tuple[float, str]] = []
        """Lines of the process and when they came, by the monotonic clock."""
        self.groups_lost = 0
        """By us, since the last start."""
        self._port, self.address, self.metrics = "0", "", ""
        self._process: subprocess.Popen[str] | None = None
        arguments = ["serve", model, "--tp", str(topology.tp)]
        arguments += ["--replicas", str(topology.replicas), "--dtype", "float32"]
        arguments += ["--log-level", "warning", "--metrics-port", "0", "--threads", "1"]
        arguments += ["--journal", str(folder / "journal") if topology.journal else "off"]
        if "--kv-tokens" not in topology.flags:
            arguments += ["--kv-tokens", "8192"]
        self._arguments = [*arguments, *topology.flags]
        self._segments = segments()
        self._sockets: set[Path] = set()
        self._prefix: list[str] = []
        self._more: dict[str, str] = {}

    # --- life ---

    def start(self, wait: bool = True) -> str:
        """Its address, once it is ready."""
        self.groups_lost = 0
        for path in self.points.iterdir():
            path.unlink()
        begun = len(self.said)
        script = f"{self.topology.prelude}\n{SERVE}"
        if self.topology.in_memory_group:
            self.memory_group().mkdir(exist_ok=True)
            script = f"open('{self.memory_group()}/cgroup.procs', 'w').write('0')\n{script}"
        self._process = subprocess.Popen(
            [
                *self._prefix,
                sys.executable,
                "-P",
                "-c",
                script,
                *self._arguments,
                "--port",
                self._port,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {FLAG: str(self.points), MARK: self.mark, "COLUMNS": "200"}
            | self._more,
        )
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        if wait:
            self.wait_said(r"^ready on ", begun, START_S)
            self.wait_said(r"^try: ", begun, 30)
            self.look_for_sockets()
            [line] = [text for _, text in self.said[begun:] if text.startswith("ready on ")]
            self.address = line.split()[2]
            self._port = self.address.rpartition(":")[2]
            for _, text in self.said[begun:]:
                if found := re.match(r"metrics on (\S+)", text):
                    self.metrics = found[1]
        return self.address

    def memory_group(self) -> Path:
        """The control group of its processes."""
        return GROUPS / f"phalanx-{self.mark}"

    def _listen(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            self.said.append((time.monotonic(), line.rstrip("\n")))

    def wait_said(self, pattern: str, since: int, timeout_s: float) -> float:
        """When a line that matches came, after line `since`. Raises `AssertionError`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended = self._process is None or self._process.poll() is not None
            for at, line in self.said[since:]:
                if re.search(pattern, line):
                    return at
            if ended:
                break
            time.sleep(0.01)
        said = "\n".join(line for _, line in self.said[since:][-30:])
        raise AssertionError(f"it never said {pattern!r}, but:\n{said}")

    @property
    def alive(self) -> bool:
        """Whether the controller's process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the controller."""
        if self._process is None:
            raise AssertionError("it was not started")
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL the controller; returns when it has ended, and its ranks soon will have."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = END_S) -> int:
        """Its exit code, when it ends."""
        if self._process is None:
            raise AssertionError("it was not started")
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self._process is None or self._process.poll() is not None:
            return 0
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    # --- its processes ---

    def processes(self) -> list[psutil.Process]:
        """Everything that was started under it and still runs, wherever it has gone."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() not in ENDED:
                    found.append(process)
        return found

    def ranks(self, replica: int | None = None) -> dict[int, psutil.Process]:
        """Rank to process, of the group that was started last."""
        del replica
        words = [path.name.split("-") for path in self.points.glob("rank-*")]
        last = max((int(epoch) for _, epoch, _ in words), default=0)
        found = {}
        for _, epoch, rank in words:
            if int(epoch) == last:
                with contextlib.suppress(psutil.Error):
                    pid = int((self.points / f"rank-{epoch}-{rank}").read_text())
                    found[int(rank)] = psutil.Process(pid)
        return found

    @property
    def epoch(self) -> int:
        """Of the group that was started last."""
        names = [path.name for path in self.points.glob("rank-*")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    def gone(self, timeout_s: float = 30.0) -> tuple[str, ...]:
        """What still runs of it so many seconds after its end."""
        deadline = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        return tuple(names)

    def look_for_sockets(self) -> None:
        """Remember where its Ray nodes have their Unix sockets."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                for word in process.cmdline():
                    if found := RAYLET.fullmatch(word):
                        self._sockets.add(Path(found[1]))

    def remains(self, timeout_s: float = 30.0) -> Remains:
        """What is left so many seconds after its end."""
        processes = self.gone(timeout_s)
        sockets = [str(path) for folder in self._sockets for path in folder.glob("*")]
        left = segments() - self._segments
        return Remains(processes=processes, sockets=tuple(sockets), segments=tuple(left))

    def sweep(self) -> None:
        """End whatever is left of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(OSError):
            self.memory_group().rmdir()

    def arm(self, point: str, **what: Any) -> None:
        """Arm a failpoint; see `protos/failpoints.py`."""
        (self.points / f"{point}.fired").unlink(missing_ok=True)
        temporary = self.points / f".{point}"
        temporary.write_text(json.dumps(what), encoding="utf-8")
        temporary.rename(self.points / point)

    def disarm(self, point: str) -> None:
        """Let it be."""
        (self.points / point).unlink(missing_ok=True)

    def fired(self, point: str) -> bool:
        """Whether it has."""
        return (self.points / f"{point}.fired").exists()

    def listeners(self) -> list[tuple[str, int, str]]:
        """(address, port, name of the process) of every TCP socket that listens."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                for item in process.net_connections("tcp"):
                    if item.status == psutil.CONN_LISTEN and item.family != socket.AF_UNIX:
                        found.add((str(item.laddr[0]), int(item.laddr[1]), process.name()))
        return sorted(found)


def segments() -> set[str]:
    """Names of shared memory in the file system, ours and Ray's."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("phalanx", "plasma"))}


def stopped(processes: Sequence[psutil.Process]) -> None:
    """Continue processes that were stopped, so that they can end."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.resume()
