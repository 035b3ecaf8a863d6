"""A rank queues the next plan while its device works, and answers in order."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from phalanx.protos.specs import CacheSpec, DecoderSpec, LoadReport, WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult
from phalanx.protos.wire import Hello, Start, Stop, encode, read_from_rank
from phalanx.workers.pending import PendingStep
from phalanx.workers.serve import serve_rank

MODEL = DecoderSpec(
    family="none",
    num_layers=1,
    hidden_size=1,
    intermediate_size=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=1,
    vocab_size=1,
    max_context=1,
    norm_eps=1.0,
)
SPEC = WorkerSpec(
    checkpoint="",
    model=MODEL,
    dtype="float32",
    tp_size=1,
    cache=CacheSpec(block_size=1, num_blocks=1, dtype="float32"),
    max_tokens_per_step=1,
    max_running=1,
    eos_token_ids=(),
    device="cpu",
)


class Device:
    """An engine whose steps are done when the test says so; notes what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.queued, self.done = threading.Semaphore(0), threading.Semaphore(0)

    tiers = SimpleNamespace(open=lambda report, say: report, close=lambda: None)

    def load(self, progress: Callable[[int, int], None]) -> LoadReport:
        return LoadReport(
            rank=0, weight_bytes=0, kv_bytes=0, tensors_used=0, tensors_ignored=[], kernels=""
        )

    def launch(self, plan: StepPlan) -> PendingStep:
        self.events.append(f"queue {plan.step}")
        self.queued.release()

        def finish() -> StepResult:
            self.done.acquire()
            self.events.append(f"read {plan.step}")
            return StepResult(plan.epoch, plan.step, [])

        return PendingStep(finish, lambda: self.done._value > 0)


class Loop:
    """The step loop's end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, *steps: int) -> None:
        plans = (StepPlan(0, step, [], [], [], []) for step in steps)
        self._connection.sendall(b"".join(map(encode, plans)))

    def receive(self) -> int:
        while not isinstance(message := read_from_rank(self._connection), StepResult):
            pass
        return message.step

    def stop(self) -> None:
        self._connection.sendall(encode(Stop()))


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def loop(device: Device) -> Iterator[Loop]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address, hello = server.getsockname(), Hello(0, 0, b"secret")
        thread = threading.Thread(target=serve_rank, args=(address, hello, lambda spec: device))
        thread.start()
        connection, _ = server.accept()
    with connection:
        read_from_rank(connection)
        connection.sendall(encode(Start(SPEC)))
        yield Loop(connection)
        device.done.release(100)
        connection.sendall(encode(Stop()))
        thread.join(30)
        assert not thread.is_alive()


def test_the_next_plan_is_queued_before_the_result_is_read(device: Device, loop: Loop) -> None:
    loop.send(0, 1)
    assert device.queued.acquire(timeout=30)
    expected = ["queue 0"]
    for step in range(6):
        assert device.queued.acquire(timeout=30)
        device.done.release()
        assert loop.receive() == step
        loop.send(step + 2)
        expected += [f"queue {step + 1}", f"read {step}"]
    assert device.events[: len(expected)] == expected


def test_a_result_does_not_wait_for_another_plan(device: Device, loop: Loop) -> None:
    loop.send(0)
    device.done.release()
    assert loop.receive() == 0
    loop.send(1)
    device.done.release()
    assert loop.receive() == 1


def test_what_was_queued_before_the_end_is_let_go(device: Device, loop: Loop) -> None:
    """Nobody waits for those results any more."""
    loop.send(0)
    loop.stop()
