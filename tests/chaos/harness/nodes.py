"""Two Ray nodes, each in a network namespace of its own, with one cable between them.

The cable can be cut, and packets can be lost on it without a word, one way or both: a node sends
to a hardware address that nobody has. Nothing but `ip` is needed for that. A bad line beside it
(`line.py`) needs TUN devices as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import psutil

from harness import line as line_script
from harness.line import Line, Tally
from harness.server import MARK, Server, Topology

NOBODY = "02:00:00:00:00:99"
PORT = 6379
LINE = Path(line_script.__file__)
OBJECT_STORE = 80 * 2**20


def permitted() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if shutil.which("ip") is None:
        return "the command ip is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"phx{uuid.uuid4().hex[:6]}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is not here"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"namespaces are refused: {made.stderr.strip()}"


def ip(*words: str, space: str | None = None, check: bool = True) -> None:
    """The command, in a namespace."""
    command = ["ip", *(["-n", space] if space else []), *words]
    subprocess.run(command, check=check, capture_output=True, text=True)


class Cable:
    """Two namespaces, "a" and "b", joined by one pair of interfaces; "a" is reached from here."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:5]
        number = 16 + int(tag, 16) % 200
        self.spaces = {side: f"phx-{tag}-{side}" for side in "ab"}
        self.addresses = {"a": f"10.{number}.1.1", "b": f"10.{number}.1.2"}
        self.door = f"10.{number}.2.1"
        """Address of "a" for this namespace."""
        self._line: subprocess.Popen[str] | None = None
        self._links = {side: f"px{tag}{side}" for side in "ab"}
        door = f"px{tag}d"
        for space in self.spaces.values():
            ip("netns", "add", space)
            ip("link", "set", "lo", "up", space=space)
        ip("link", "add", self._links["a"], "type", "veth", "peer", "name", self._links["b"])
        for side in "ab":
            link, space = self._links[side], self.spaces[side]
            ip("link", "set", link, "netns", space)
            ip("addr", "add", f"{self.addresses[side]}/24", "dev", link, space=space)
            ip("link", "set", link, "up", space=space)
        ip("link", "add", door, "type", "veth", "peer", "name", f"{door}n")
        ip("link", "set", f"{door}n", "netns", self.spaces["a"])
        ip("addr", "add", f"{self.door}/24", "dev", f"{door}n", space=self.spaces["a"])
        ip("link", "set", f"{door}n", "up", space=self.spaces["a"])
        ip("addr", "add", f"10.{number}.2.2/24", "dev", door)
        ip("link", "set", door, "up")

    def cut(self) -> None:
        """Pull it out."""
        ip("link", "set", self._links["b"], "down", space=self.spaces["b"])

    def drop(self, *sides: str) -> None:
        """What these sides send is lost from now on, and nobody is told."""
        for side in sides:
            other = self.addresses["b" if side == "a" else "a"]
            ip(
                *("neigh", "replace", other, "lladdr", NOBODY, "nud", "permanent"),
                *("dev", self._links[side]),
                space=self.spaces[side],
            )

    def spoil(self, line: Line) -> None:
        """Whatever passes between both sides takes a bad line beside the cable, until `mend`."""
        ends = {side: f"{self._links[side]}t" for side in "ab"}
        words = [word for side in "ab" for word in (ends[side], self.spaces[side])]
        words.append(json.dumps(asdict(line)))
        self._line = subprocess.Popen(
            [sys.executable, "-P", str(LINE), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line.stdout is not None
        assert self._line.stdout.readline() == "up\n", "the bad line did not come up"
        for side, other in ("ab", "ba"):
            here, there = self.addresses[side], self.addresses[other]
            route = ["route", "add", f"{there}/32", "dev", ends[side], "src", here]
            ip(*route, space=self.spaces[side])

    def mend(self) -> Tally:
        """Away with the bad line; what it has done."""
        assert self._line is not None
        line, self._line = self._line, None
        said, _ = line.communicate(timeout=30)  # its devices go, and their routes
        return Tally(**json.loads(said))

    def heal(self) -> None:
        """As good as new."""
        ip("link", "set", self._links["b"], "up", space=self.spaces["b"])
        for side in "ab":
            other = self.addresses["b" if side == "a" else "a"]
            ip(
                *("neigh", "del", other, "dev", self._links[side]),
                space=self.spaces[side],
                check=False,
            )

    def close(self) -> None:
        """Away with it."""
        if self._line is not None:
            self.mend()
        for space in self.spaces.values():
            ip("netns", "del", space, check=False)


class TwoNodes(Server):
    """A cluster with a rank on each of two nodes; the controller is beside node "a"."""

    def __init__(self, folder: Path, model: str, topology: Topology) -> None:
        super().__init__(folder, model, topology)
        self.cable = Cable()
        self._ray: dict[str, subprocess.Popen[bytes]] = {}
        self._log = folder / "ray.log"
        self._started = 0
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        self._more = token | {"RAY_USAGE_STATS_ENABLED": "0", MARK: self.mark}
        self._prefix = self._inside("a")
        self._arguments += ["--ray-address", f"{self.cable.addresses['a']}:{PORT}"]
        self._arguments += ["--placement", "STRICT_SPREAD", "--host", self.cable.door]
        self._arguments += ["--insecure"]
        self._arguments[self._arguments.index("--metrics-port") + 1] = "off"

    def _inside(self, side: str) -> list[str]:
        return ["ip", "netns", "exec", self.cable.spaces[side]]

    def start(self, wait: bool = True) -> str:
        """Nodes that do not run are started before."""
        for side in "ab":
            self.start_node(side)
        return super().start(wait)

    def start_node(self, side: str) -> None:
        """`ray start`, if it does not run."""
        known = self._ray.get(side)
        if known is not None and known.poll() is None:
            return
        addresses = self.cable.addresses
        words = ["ray", "start", "--block", "--num-cpus", "1", "--disable-usage-stats"]
        words += ["--node-ip-address", addresses[side], "--object-store-memory", str(OBJECT_STORE)]
        head = ["--head", "--port", str(PORT), "--include-dashboard", "false"]
        words += head if side == "a" else ["--address", f"{addresses['a']}:{PORT}"]
        # what ranks read comes from their node
        environment = os.environ | self._more | {"PHALANX_FAILPOINTS": str(self.points)}
        with self._log.open("ab") as log:
            self._ray[side] = subprocess.Popen(
                [*self._inside(side), *words], stdout=log, stderr=log, env=environment
            )
        self._started += 1
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            said = self._log.read_text(errors="replace").count("Ray runtime started")
            if said >= self._started:
                return
            time.sleep(0.1)
        raise AssertionError(f"Ray did not start: {self._log.read_text(errors='replace')[-800:]}")

    def node(self, side: str) -> subprocess.Popen[bytes]:
        """The process that holds a node."""
        return self._ray[side]

    def heal(self) -> None:
        """The cable is whole again; a node that was given up meanwhile is started again."""
        self.cable.heal()
        for _ in range(30):
            node = self._ray["b"]
            if node.poll() is not None:
                self.start_node("b")
                return
            time.sleep(0.1)

    def close(self) -> None:
        """End all of it."""
        try:
            self.stop()
        finally:
            for node in self._ray.values():
                with contextlib.suppress(psutil.Error):
                    for child in psutil.Process(node.pid).children(recursive=True):
                        child.kill()
                node.kill()
                node.wait()
            self.sweep()
            self.cable.close()
