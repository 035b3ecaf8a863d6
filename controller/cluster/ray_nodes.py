"""Which of Ray's nodes still answer: Ray itself takes 15 s to a minute to give a dead one up."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray

KNOCK_S = 1.0
"""For a node to answer."""
REMEMBER_S = 60.0
"""For so long a node that has refused is gone, whoever listens at its port by then."""

Addresses = Mapping[str, tuple[str, int]]
"""Node to host and port of its raylet."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of knocking at nodes; who is in neither set was silent."""

    here: frozenset[str]
    refused: frozenset[str]


class NodeWatch:
    """Nodes that Ray takes for alive and that have gone. Any thread may ask.

    A node that has never answered is left to Ray: there may be no way to it from here.
    """

    def __init__(
        self,
        addresses: Callable[[], Addresses] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """addresses: of the nodes that Ray takes for alive."""
        self._addresses, self._clock = addresses or raylets, clock
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._refused: dict[str, float] = {}

    def gone(self) -> frozenset[str]:
        """Those that refuse, or are silent for `KNOCK_S`."""
        addresses = self._addresses()
        answers = knock(addresses)
        with self._lock:
            now = self._clock()
            self._known = (self._known | answers.here) & addresses.keys()
            self._refused |= {node: now for node in answers.refused & self._known}
            self._refused = {
                node: since
                for node, since in self._refused.items()
                if node in addresses and since > now - REMEMBER_S
            }
            silent = self._known - answers.here
            return frozenset(silent | self._refused.keys())


def raylets() -> dict[str, tuple[str, int]]:
    """Of the cluster that this process is connected to."""
    return {
        str(node["NodeID"]): (str(node["NodeManagerAddress"]), int(node["NodeManagerPort"]))
        for node in ray.nodes()
        if node["Alive"]
    }


def knock(addresses: Addresses, timeout_s: float = KNOCK_S) -> Answers:
    """Connect to all of them at once, and hang up."""
    here, refused = set(), set()
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for node, (host, port) in addresses.items():
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            link = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            link.setblocking(False)
            failed = link.connect_ex((host, port))
            if failed in (0, errno.EINPROGRESS):
                selector.register(link, selectors.EVENT_WRITE, (node, link))
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                node, link = key.data
                selector.unregister(link)
                failed = link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if failed == 0:
                    here.add(node)
                elif failed == errno.ECONNREFUSED:
                    refused.add(node)
    return Answers(frozenset(here), frozenset(refused))
