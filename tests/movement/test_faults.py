"""Whatever goes wrong with a hand-over, the streams end with the same tokens and nothing is kept."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from phalanx.protos.errors import GroupLost
from phalanx.protos.transfers import FRAME, Offer, Take, Withdraw
from phalanx.workers.exchange import BlockExchange

PROMPT = list(range(5, 65))
TOKENS = 160
SAMPLED = {"temperature": 0.9, "seed": 3, "n": 2}


def ask(scene: Any, label: str) -> list[tuple[Any, Any]]:
    return [
        scene.ask(f"{label} greedy", PROMPT, max_tokens=TOKENS),
        scene.ask(f"{label} sampled", [9, *PROMPT], max_tokens=TOKENS, **SAMPLED),
    ]


class Wire:
    """Stands between the ranks; forwards what the source says, with a fault in one frame."""

    def __init__(self, address: tuple[str, int], fault: str, part: int) -> None:
        self._address, self._fault, self._part = address, fault, part
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()[:2]
        self.faults = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            asking, _ = self._listener.accept()
            source = socket.create_connection(self._address)
            for way in ((self._ask, asking, source), (self._answer, source, asking)):
                threading.Thread(target=self._quietly, args=way, daemon=True).start()

    def _quietly(self, work: Callable[..., None], *ends: socket.socket) -> None:
        with contextlib.suppress(OSError):
            work(*ends)
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the other thread
            end.close()

    def _ask(self, asking: socket.socket, source: socket.socket) -> None:
        while data := asking.recv(65536):
            source.sendall(data)

    def _answer(self, source: socket.socket, asking: socket.socket) -> None:
        while len(header := source.recv(FRAME.size, socket.MSG_WAITALL)) == FRAME.size:
            part, _, size, _ = FRAME.unpack(header)
            body = bytearray(source.recv(size, socket.MSG_WAITALL) if size else b"")
            if part == self._part and body:
                self.faults += 1
                if self._fault == "cut":
                    return
                if self._fault == "silence":
                    threading.Event().wait(10)
                    return
                if self._fault == "body":
                    body[700] ^= 4
                else:
                    header = FRAME.pack(part, 77, size, 0)
            asking.sendall(header + bytes(body))


@pytest.mark.parametrize(
    ("fault", "part"),
    [("body", 0), ("body", 1), ("header", 0), ("cut", 0), ("cut", 1), ("silence", 1)],
)
def test_damage_on_the_way(
    tiny_llama: Callable[..., Path],
    play: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    part: int,
) -> None:
    defaults: dict[str, Any] = BlockExchange.__init__.__kwdefaults__  # type: ignore[assignment]
    monkeypatch.setitem(defaults, "timeout_s", 3.0)

    async def work(scene: Any) -> None:
        scene.engine._movement._mover._timeout_s = 5.0
        await scene.start(0, 1)
        before = ask(scene, "calm")
        for _, task in before:
            await task
        await scene.start(1, 1)
        exchange = scene.fleets[0].exchange
        wire = Wire(exchange.addresses[0], fault, part)
        damaged = msgspec.structs.replace(exchange, addresses=[wire.address])
        scene.fleets[0]._links._exchange = damaged
        scene.close(1)
        readers = ask(scene, "moved")
        await scene.until(lambda: all(len(read.tokens.get(0, ())) > 4 for read, _ in readers))
        scene.open(1)
        leaving = scene.streams_on(0)
        report = await scene.engine.drain(0)
        assert leaving == report.recomputed > 0
        for _, task in readers:
            await task
        assert [read.tokens for read, _ in readers] == [read.tokens for read, _ in before]
        failed = [kept.move.error for kept in scene.engine.moves()]
        assert wire.faults >= len(failed) == leaving and all(failed)
        await scene.settle()

    play(str(tiny_llama()), work)


@pytest.mark.parametrize(
    ("victim", "message", "part"),
    [
        (0, Offer, 0),
        (0, Offer, 1),
        (0, Withdraw, 0),
        (1, Take, 0),
        (1, "arrived", 0),
        (1, "adopted", 0),
    ],
)
def test_a_replica_dies_over_a_hand_over(
    tiny_llama: Callable[..., Path],
    play: Callable[..., None],
    victim: int,
    message: Any,
    part: int,
) -> None:
    """As it is told something of the transfer, or when all of it has come. A third one is left."""

    async def work(scene: Any) -> None:
        for index in (0, 1, 2):
            await scene.start(index, 1)
        scene.close(1, 2)
        before = ask(scene, "calm")
        for _, task in before:
            await task
        arm(scene, victim, message, part)
        readers = ask(scene, "moved")
        await scene.until(lambda: all(len(read.tokens.get(0, ())) > 4 for read, _ in readers))
        assert scene.streams_on(0) == len(readers)
        scene.open(1)
        draining = asyncio.create_task(scene.engine.drain(0))
        await scene.until(lambda: scene.handles[victim].replica.lost is not None)
        scene.open(2)
        scene.engine.tick(0.0)
        await draining
        for _, task in readers:
            await task
        assert [read.tokens for read, _ in readers] == [read.tokens for read, _ in before]
        await scene.settle()

    play(str(tiny_llama()), work)


def arm(scene: Any, victim: int, message: Any, part: int) -> None:
    """Let a replica die at this message."""
    fleet, scheduler = scene.fleets[victim], scene.schedulers[victim]
    tell, adopt, arrived = fleet.tell, scheduler.adopt, scheduler.arrivals.arrived

    def dying(told: Any) -> None:
        wanted = isinstance(message, type) and isinstance(told, message)
        if wanted and getattr(told, "part", 0) == part:
            raise GroupLost("killed by the test")
        tell(told)

    def dying_later(*arguments: Any) -> Any:
        found = (adopt if message == "adopted" else arrived)(*arguments)
        if message == "adopted" or found is not None:
            scene.handles[victim].replica._commands.put(die)
        return found

    def die() -> Any:
        # what the loop does not take for an answer of a scheduler
        raise GroupLost("killed by the test")

    fleet.tell = dying
    if message == "adopted":
        scheduler.adopt = dying_later
    elif message == "arrived":
        scheduler.arrivals.arrived = dying_later
