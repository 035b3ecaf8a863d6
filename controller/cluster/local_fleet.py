"""A fleet over threads of this process, handed in by the caller: no Ray, no second process.

It speaks the same frames over the same sockets as `RayFleet`, so that everything but placement
is the real thing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from phalanx.protos.errors import PhalanxError
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult
from phalanx.protos.wire import Hello

from .exchanging import ExchangingFleet
from .fleet import Progress, RankFacts
from .link import RankLinks

RankMain = Callable[[tuple[str, int], Hello], None]
"""What a rank's thread runs: address of the step loop, and how to greet it."""


class LocalFleet(ExchangingFleet):
    """`Fleet` whose rank r is a thread that runs `mains[r]`."""

    def __init__(self, mains: list[RankMain], start_timeout_s: float = 60.0) -> None:
        self._mains, self._timeout = mains, start_timeout_s
        self._links: RankLinks | None = None
        self._threads: list[threading.Thread] = []

    def start(self, spec: WorkerSpec, progress: Progress) -> list[RankFacts]:
        """Start the threads and load."""
        links = self._links = RankLinks(len(self._mains), spec.epoch)
        for rank, main in enumerate(self._mains):
            hello = Hello(rank, spec.epoch, links.secret)
            thread = threading.Thread(
                target=_quietly, args=(main, links.address, hello), name=f"rank-{rank}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        try:
            links.accept(self._timeout)
            reports = links.load(spec, progress, self._timeout)
        except BaseException:
            self.stop()
            raise
        return [
            RankFacts(rank=report.rank, node="local", device="cpu thread", report=report)
            for report in reports
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
        """Close the sockets; the threads end by themselves."""
        if self._links is not None:
            self._links.close()
        for thread in self._threads:
            thread.join(timeout=5)
        self._links, self._threads = None, []

    def _open(self) -> RankLinks:
        if self._links is None:
            raise RuntimeError("the fleet is not started")
        return self._links


def _quietly(main: RankMain, address: tuple[str, int], hello: Hello) -> None:
    try:
        main(address, hello)
    except PhalanxError:
        return  # the step loop has been told
