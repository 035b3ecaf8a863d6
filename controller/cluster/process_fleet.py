"""A fleet of child processes on this machine: no Ray, nothing else to start or to stop."""

from __future__ import annotations

import contextlib
import selectors
import subprocess
import sys
import time

import msgspec

from phalanx.protos.errors import ConfigError, GroupLost
from phalanx.protos.places import Invitation, Place
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult

from .exchanging import ExchangingFleet
from .fleet import Progress, RankFacts
from .link import RankLinks

RANK = (sys.executable, "-P", "-m", "phalanx.workers.process")
LOOPBACK = "127.0.0.1"
END_S = 2.0


class ProcessFleet(ExchangingFleet):
    """`Fleet` with one child process per rank, on CPUs: `reserve`, then `start`."""

    def __init__(
        self,
        tp_size: int,
        *,
        collectives: str,
        threads: int | None,
        start_timeout_s: float,
        step_timeout_s: float,
        silence_timeout_s: float,
        exchange: bool = False,
    ) -> None:
        """threads: CPU threads of a rank; None divides the cores by the ranks. exchange: ranks
        hand out KV blocks to those of other replicas."""
        self._tp_size, self._collectives, self._threads = tp_size, collectives, threads
        self._start_timeout_s, self._step_timeout_s = start_timeout_s, step_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._exchange_host = LOOPBACK if exchange else None
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._places: list[Place] = []
        self._links: RankLinks | None = None

    def reserve(self) -> list[Place]:
        """Start the processes and hear what they find. Raises `GroupLost`."""
        deadline = time.monotonic() + self._start_timeout_s
        for _ in range(self._tp_size):
            rank = subprocess.Popen(
                RANK,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is ours; ranks end when their step loop does
            )
            self._ranks.append(rank)
        self._places = [self._hear(number, deadline) for number in range(self._tp_size)]
        return self._places

    def _hear(self, number: int, deadline: float) -> Place:
        output = self._ranks[number].stdout
        if output is None:
            raise RuntimeError("a rank's output is not piped")
        with selectors.DefaultSelector() as waiting:
            waiting.register(output, selectors.EVENT_READ)
            if not waiting.select(max(deadline - time.monotonic(), 0)):
                raise GroupLost(f"rank {number} did not start in {self._start_timeout_s:g} s")
        line = output.readline()
        if not line:
            raise GroupLost(f"rank {number} ended while starting")
        return msgspec.json.decode(line, type=Place)

    def start(self, spec: WorkerSpec, progress: Progress) -> list[RankFacts]:
        """Form the group and load."""
        links = self._links = RankLinks(
            self._tp_size, spec.epoch, LOOPBACK, silence_timeout_s=self._silence_timeout_s
        )
        for number, (rank, place) in enumerate(zip(self._ranks, self._places, strict=True)):
            invitation = Invitation(
                rank=number,
                epoch=spec.epoch,
                secret=links.secret,
                step_loop=links.address,
                host=LOOPBACK,
                port=self._places[0].port,
                collectives=self._resolve_collectives(),
                threads=self._threads or max(place.cpu_count // self._tp_size, 1),
                timeout_s=self._step_timeout_s,
                exchange_host=self._exchange_host,
            )
            # a rank that has ended is found by `_check_alive`
            with contextlib.suppress(BrokenPipeError):
                if rank.stdin is not None:
                    rank.stdin.write(msgspec.json.encode(invitation) + b"\n")
                    rank.stdin.flush()
        try:
            links.accept(self._start_timeout_s, alive=self._check_alive)
            reports = links.load(spec, progress, self._start_timeout_s)
        except BaseException:
            self.stop(at_once=True)
            raise
        return [
            RankFacts(rank=report.rank, node="local", device=place.processor, report=report)
            for report, place in zip(reports, self._places, strict=True)
        ]

    def send(self, plan: StepPlan) -> None:
        """To every rank."""
        self._open().send(plan)

    def receive(self, timeout_s: float) -> StepResult:
        """From the rank that answers."""
        return self._open().receive(timeout_s)

    def check(self) -> None:
        """Raise `GroupLost` if a rank has gone."""
        self._open().check()

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the ranks to end, then end them."""
        if self._links is not None:
            self._links.close()
        deadline = time.monotonic() + (0 if at_once else END_S)
        for rank in self._ranks:
            for pipe in (rank.stdin, rank.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            try:
                rank.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
        self._links, self._ranks = None, []

    def _open(self) -> RankLinks:
        if self._links is None:
            raise RuntimeError("the fleet is not started")
        return self._links

    def _resolve_collectives(self) -> str:
        shared = all(place.shared_memory for place in self._places)
        if self._collectives == "auto":
            return "shm" if shared else "gloo"
        if self._collectives == "nccl" or (self._collectives == "shm" and not shared):
            raise ConfigError(
                f"collectives is {self._collectives!r}, allowed for processes of this machine: "
                f"auto, gloo{', shm' if shared else ''}"
            )
        return self._collectives

    def _check_alive(self) -> None:
        for number, rank in enumerate(self._ranks):
            if rank.poll() is not None:
                raise GroupLost(f"rank {number} ended while starting, code {rank.returncode}")
