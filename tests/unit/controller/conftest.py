"""Schedulers whose ranks hand blocks to each other, driven by hand."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import pytest

from phalanx.protos.steps import StepPlan
from phalanx.protos.transfers import Offer, Take, Withdraw

RANKS = 2


class Side:
    """A scheduler, and a rank that executes plans and messages in the order of their sending."""

    def __init__(self, loop: Any) -> None:
        self.scheduler, self.rank, self.cache = loop.scheduler, loop.rank, loop.cache
        self.inbox: deque[Any] = deque()
        self.results: deque[Any] = deque()
        self.offered: dict[tuple[int, int], list[int]] = {}
        self.takes: dict[int, Take] = {}

    def plan(self) -> None:
        plan = self.scheduler.schedule(0.0)
        if plan is not None:
            self.inbox.append(plan)

    def execute(self) -> None:
        match message := self.inbox.popleft():
            case StepPlan():
                self.results.append(self.rank.execute(message))
            case Offer():
                self.offered[message.transfer, message.part] = message.blocks
            case Withdraw():
                for part in (0, 1):
                    self.offered.pop((message.transfer, part), None)
            case Take():
                self.takes[message.transfer] = message


@dataclasses.dataclass
class Transfer:
    """What the mover, and the copying ranks, know of one."""

    number: int
    source: Side
    target: Side
    base: str = ""
    """Of the request; none for a prefix."""
    outline: Any = None
    reserved: bool = False
    frozen: bool = False
    over: bool = False
    """Given up or done, as far as the mover is concerned."""
    withdrawn: bool = False
    copied: int = 0
    part: int = 0
    said: list[int] = dataclasses.field(default_factory=lambda: [0] * RANKS)
    """Parts that each rank has answered for; 2 = it is through."""


@pytest.fixture
def copying_ranks() -> tuple[type[Side], type[Transfer]]:
    """One side of a transfer, and what is known of a transfer."""
    return Side, Transfer
