"""Scenarios as data: what is served, what is asked, what is done to it, what must hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.server import Topology

REAL = "smollm2"


@dataclass(frozen=True)
class Harm:
    """One thing that is done to a cluster while streams run."""

    what: str
    """A name of `harms.HARMS`."""
    at: tuple[float, float] = (0.05, 0.8)
    """Between which parts of all tokens it comes, drawn evenly; 0: before the first one."""
    rank: int = 1
    seconds: float = 0.0
    point: str = ""
    action: str = "kill"
    after: int = 1


@dataclass(frozen=True)
class Load:
    """How many streams, of about how many tokens."""

    streams: int = 8
    tokens: int = 48


@dataclass(frozen=True)
class Scenario:
    """One line of the table of tests."""

    number: int
    name: str
    harms: tuple[Harm, ...]
    topology: Topology = field(default_factory=Topology)
    load: Load = field(default_factory=Load)
    detect_s: float | None = None
    """Until a lost group must be noticed, on a machine with nothing else to do."""
    gap_s: float | None = None
    """95 of 100 streams' longest pauses are shorter, on such a machine."""
    groups: int | None = None
    """How many groups of ranks may be lost."""
    gate: bool = False
    """Runs with the default tests as well."""


MANY = Load(32, 64)
MIDDLE = Load(16, 48)
TINY = Topology()
SHM = Topology(flags=())
REAL_GLOO = Topology(REAL)
REAL_SHM = Topology(REAL, flags=())
SPARED = Topology(flags=("--collectives", "gloo", "--spares", "1"))
GROUPED = Topology(in_memory_group=True)
MOVES = Topology(replicas=2, tp=2)
PRESSED = Topology(flags=("--kv-tokens", "320"))
"""All streams of `MIDDLE` together want four times as much."""

SCENARIOS = (
    Scenario(1, "gate", (Harm("kill"),), SHM, detect_s=1, gap_s=15, groups=1, gate=True),
    Scenario(1, "cold", (Harm("kill", (0.0, 0.9)),), REAL_GLOO, MANY, 1, 15, 1),
    Scenario(1, "shared-memory", (Harm("kill", (0.0, 0.9)),), REAL_SHM, MANY, 1, 15, 1),
    Scenario(1, "live-replica", (Harm("kill", (0.0, 0.9)),), MOVES, MANY, 1, 3, 1),
    Scenario(1, "spare", (Harm("kill", (0.0, 0.9)),), SPARED, MANY, 1, 5, 1),
    Scenario(2, "cold", (Harm("kill", (0.0, 0.9), rank=0),), REAL_GLOO, MANY, 1, 15, 1),
    Scenario(2, "tiny", (Harm("kill", (0.0, 0.9), rank=0),), TINY, MANY, 1, 15, 1),
    Scenario(
        3,
        "both-and-again",
        (Harm("kill-all"), Harm("kill-next", (0.0, 0.0))),
        TINY,
        MANY,
        1,
        20,
        2,
    ),
    Scenario(4, "stopped", (Harm("stop", seconds=30),), TINY, MANY, 4, 20, 1),
    Scenario(5, "aborted", (Harm("abort"),), TINY, MANY, 1, 15, 1),
    Scenario(5, "segmentation-fault", (Harm("segv", rank=0),), SHM, MANY, 1, 15, 1),
    Scenario(6, "slow", (Harm("slow", (0.01, 0.1), seconds=20),), TINY, Load(32, 180), groups=0),
    Scenario(
        7,
        "lock-held",
        (Harm("arm", point="step", action="hold", seconds=10),),
        Topology(flags=("--collectives", "gloo", "--step-timeout-s", "5")),
        MANY,
        7,
        25,
        1,
    ),
    Scenario(8, "controller", (Harm("controller"),), SHM, MIDDLE, gap_s=30, gate=True),
    Scenario(8, "twice", (Harm("controller", (0.1, 0.4)), Harm("controller")), REAL_GLOO, MANY),
    Scenario(8, "torn-tail", (Harm("torn"),), TINY, MANY),
    Scenario(23, "pressure", (), PRESSED, MIDDLE, groups=0, gate=True),
    Scenario(12, "out-of-memory", (Harm("memory"),), GROUPED, MANY, gap_s=20, groups=1),
    *(
        Scenario(
            13,
            point,
            (Harm("arm-controller", (0.0, 0.7), point=point, seconds=seconds),),
            SHM,
            MIDDLE,
            gate=point in ("sampled", "releasing"),
        )
        for point, seconds in (
            ("sampled", 0.3),
            ("journalled", 0.0),
            ("finishing", 0.3),
            ("releasing", 0.0),
        )
    ),
    Scenario(
        13,
        "epoch",
        (Harm("arm-controller", (0.1, 0.5), point="epoch"), Harm("kill", (0.0, 0.0))),
        TINY,
        MIDDLE,
    ),
    Scenario(
        13,
        "releasing-raises",
        (Harm("arm", (0.0, 0.5), point="releasing", action="raise"),),
        TINY,
        MIDDLE,
        groups=1,
    ),
)
