"""Messages between a step loop and its ranks that are late, torn, lost, or come twice.

`PRELUDE` runs in the controller's process before it serves. While the folder of failpoints holds a
file "calls", JSON of `Calls`, messages of its kind are harmed; a harm that ends the group comes
once, then the file is "calls.fired".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BENIGN = ("plan-late", "plan-in-pieces", "result-late")
"""A message is under way while others have arrived; nobody may notice."""
FATAL = (
    "plan-lost",
    "plan-lost-everywhere",
    "plan-twice",
    "plan-twice-everywhere",
    "plan-too-soon",
    "plan-cut",
    "result-lost",
    "result-twice",
    "result-torn",
)
"""TCP does none of this, or ends the connection over it: the group has to end."""

PRELUDE = """
import json, os, random, select, socket, time
from pathlib import Path
from phalanx.controller.cluster.link import RankLinks
from phalanx.protos.wire import encode

calls = Path(os.environ["PHALANX_FAILPOINTS"], "calls")
send, receive, draws = RankLinks.send, RankLinks.receive, {}

def harm(of):
    "What is to be done to this message."
    try:
        armed = json.loads(calls.read_text())
    except FileNotFoundError:
        return None
    draw = draws.setdefault(armed["seed"], random.Random(armed["seed"]))
    if not armed["kind"].startswith(of) or draw.random() >= armed["share"]:
        return None
    calls.with_name("calls.count").open("a").write(".")
    if armed["once"]:
        calls.rename(calls.with_name("calls.fired"))
    return armed["kind"]

def harmed_send(self, plan):
    kept, self.kept = getattr(self, "kept", None), None
    kind = None if kept else harm("plan")
    frame, ranks = encode(plan), self._ranks
    if kind == "plan-lost-everywhere":
        return
    if kind == "plan-twice-everywhere":
        send(self, plan)
    if kind == "plan-too-soon":
        self.kept = frame
        return
    for rank in ranks:
        last = rank is ranks[-1]
        if last and kind == "plan-late":
            time.sleep(0.03)
        if last and kind == "plan-lost":
            continue
        if last and kind == "plan-in-pieces":
            third = 1 + len(frame) // 3
            for first in range(0, len(frame), third):
                rank.sendall(frame[first : first + third])
                time.sleep(0.01)
            continue
        if last and kind == "plan-cut":
            rank.sendall(frame[: len(frame) // 2])
            rank.shutdown(socket.SHUT_RDWR)
            continue
        if last and kind == "plan-twice":
            rank.sendall(frame)
        rank.sendall(frame)
        if kept:
            rank.sendall(kept)

def harmed_receive(self, timeout_s):
    kept, self.again = getattr(self, "again", None), None
    if kept:
        return kept
    kind = harm("result")
    if kind == "result-late":
        time.sleep(0.03)
    if kind == "result-torn":
        answering = self._ranks[self._answering]
        select.select([answering], [], [], timeout_s)
        answering.recv(7)
    result = receive(self, timeout_s)
    if kind == "result-lost":
        return receive(self, timeout_s)
    if kind == "result-twice":
        self.again = result
    return result

RankLinks.send, RankLinks.receive = harmed_send, harmed_receive
"""


@dataclass(frozen=True)
class Calls:
    """What is done to messages, by chance."""

    kind: str
    share: float
    once: bool
    seed: int


def arm(folder: Path, calls: Calls) -> None:
    """Begin to harm messages."""
    for name in ("calls.fired", "calls.count"):
        (folder / name).unlink(missing_ok=True)
    temporary = folder / ".calls"
    temporary.write_text(json.dumps(vars(calls)))
    temporary.rename(folder / "calls")


def disarm(folder: Path) -> int:
    """Let messages be; how many were harmed."""
    (folder / "calls").unlink(missing_ok=True)
    count = folder / "calls.count"
    return len(count.read_text()) if count.exists() else 0


def executed(folder: Path) -> Mapping[str, list[int]]:
    """EPOCH-RANK to the steps that it has executed, in order."""
    return {
        path.name.removeprefix("steps-"): [int(line) for line in path.read_text().split()]
        for path in folder.glob("steps-*")
    }


def repeated(steps: Mapping[str, list[int]]) -> list[str]:
    """Steps that a rank has executed more than once under one epoch, or out of order."""
    faults = []
    for name, numbers in steps.items():
        twice = [number for number, count in Counter(numbers).items() if count > 1]
        faults += [f"{name}: step {number} twice" for number in twice]
        if not twice and numbers != list(range(len(numbers))):
            faults.append(f"{name}: steps are not in order")
    return faults
