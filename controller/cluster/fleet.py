"""The only view that the controller has of a group of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from phalanx.protos.errors import ConfigError
from phalanx.protos.moves import MoveReport
from phalanx.protos.specs import LoadReport, WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult
from phalanx.protos.transfers import Exchange, Offer, Take, Taken, Withdraw

Progress = Callable[[int, int, int], None]
"""Called with (rank, weight elements loaded, elements in all)."""


REASON = "; Ray says of "
"""Goes before what Ray knows of a lost rank."""


class NoPlace(ConfigError):
    """The cluster has no free places of the shape that a group needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """Where a rank runs and what it holds."""

    rank: int
    node: str
    device: str
    report: LoadReport
    place: str = ""
    """The node, as `room.Free` names it."""


class Fleet(Protocol):
    """One group of ranks. `send` and `receive` belong to one thread, the step loop's."""

    def start(self, spec: WorkerSpec, progress: Progress) -> list[RankFacts]:
        """Load the model on every rank; returns when all are ready. Raises `ModelError`,
        `ConfigError` or `GroupLost`, leaving nothing behind."""

    def send(self, plan: StepPlan) -> None:
        """Hand a plan to every rank; returns before it is executed."""

    def receive(self, timeout_s: float) -> StepResult:
        """The answer to the oldest plan without one. Raises `GroupLost` when a rank died, when
        ranks disagree, or after `timeout_s` seconds."""

    def moves(self, timeout_s: float) -> list[tuple[int, MoveReport]]:
        """What ranks have said of moves since the last call, waiting so long for the first word;
        with rank numbers. Raises `GroupLost` as `receive` does."""

    def check(self) -> None:
        """Raise `GroupLost` if a rank has gone, without waiting; for idle times."""

    @property
    def exchange(self) -> Exchange | None:
        """Where its ranks hand out KV blocks; None where they do not, or before `start`."""

    def tell(self, message: Offer | Withdraw | Take) -> None:
        """Say something of blocks to every rank, behind the plans sent before."""

    def drain_taken(self) -> list[tuple[int, Taken]]:
        """What ranks have said of transfers, as `receive` and `check` have heard it."""

    def stop(self, *, at_once: bool = False) -> None:
        """End every rank and free what it holds; may be called at any time, more than once.

        at_once: a rank is lost, the others cannot end in good order.
        """
