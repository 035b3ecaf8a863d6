"""Which nodes have gone, by their raylets' ports; played by sockets of this machine."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from phalanx.controller.cluster.ray_nodes import REMEMBER_S, NodeWatch, knock


class Nodes:
    """What Ray says, and what is true."""

    def __init__(self) -> None:
        self.now = 0.0
        self.addresses: dict[str, tuple[str, int]] = {}
        self._listening: dict[str, socket.socket] = {}
        self.watch = NodeWatch(lambda: self.addresses, lambda: self.now)

    def up(self, name: str, port: int = 0) -> None:
        listener = socket.create_server(("127.0.0.1", port))
        self._listening[name] = listener
        self.addresses[name] = listener.getsockname()

    def down(self, name: str) -> None:
        self._listening.pop(name).close()

    def close(self) -> None:
        for listener in self._listening.values():
            listener.close()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with contextlib.closing(Nodes()) as made:
        yield made


def test_a_node_that_refuses_has_gone_at_once(nodes: Nodes) -> None:
    nodes.up("a")
    nodes.up("b")
    assert nodes.watch.gone() == set()
    nodes.down("b")
    assert nodes.watch.gone() == {"b"}


def test_a_node_that_has_never_answered_is_left_to_ray(nodes: Nodes) -> None:
    """The controller may be where raylets cannot be reached."""
    nodes.up("a")
    nodes.down("a")
    assert nodes.watch.gone() == set()


def test_another_node_at_the_same_port_does_not_bring_it_back(nodes: Nodes) -> None:
    """Where ports are fixed, a raylet that is started again has that of the dead one, which Ray
    still takes for alive."""
    nodes.up("a")
    nodes.watch.gone()
    nodes.down("a")
    assert nodes.watch.gone() == {"a"}
    nodes.up("b", nodes.addresses["a"][1])
    assert nodes.watch.gone() == {"a"}
    nodes.now = REMEMBER_S + 1
    assert nodes.watch.gone() == set()


def test_what_ray_has_given_up_is_forgotten(nodes: Nodes) -> None:
    nodes.up("a")
    nodes.watch.gone()
    nodes.down("a")
    del nodes.addresses["a"]
    assert nodes.watch.gone() == set()


def test_a_node_that_says_nothing_neither_is_here_nor_refuses() -> None:
    """A line of connections that nobody takes is as silent as a cable that was cut."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as stack:
        address = deaf.getsockname()
        for _ in range(3):
            link = stack.enter_context(socket.socket())
            link.setblocking(False)
            link.connect_ex(address)
        answers = knock({"a": address}, 0.3)
    assert not answers.here
    assert not answers.refused
