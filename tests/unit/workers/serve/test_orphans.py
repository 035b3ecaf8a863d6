"""A rank whose step loop has gone: it ends, also when it hangs in the midst of a step."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from phalanx.protos.errors import GroupLost
from phalanx.protos.specs import CacheSpec, DecoderSpec, LoadReport, RopeSpec, WorkerSpec
from phalanx.protos.steps import StepPlan
from phalanx.protos.wire import Hello, Start, encode, read_from_rank
from phalanx.workers import serve
from phalanx.workers.engine import Engine
from phalanx.workers.serve import serve_rank

SPEC = WorkerSpec(
    checkpoint="none",
    model=DecoderSpec(
        family="llama",
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=100,
        max_context=64,
        norm_eps=1e-5,
        rope=RopeSpec(rotary_dim=4),
    ),
    dtype="float32",
    tp_size=1,
    cache=CacheSpec(block_size=4, num_blocks=16, dtype="float32"),
    max_tokens_per_step=64,
    max_running=8,
    eos_token_ids=(0,),
    device="cpu",
    epoch=1,
)
REPORT = LoadReport(
    rank=0, weight_bytes=0, kv_bytes=0, tensors_used=0, tensors_ignored=[], kernels="none"
)


class Hanging:
    """An engine that waits for peers which never come."""

    def __init__(self) -> None:
        self.stepping, self.released = threading.Event(), threading.Event()

    tiers = SimpleNamespace(open=lambda report, say: report, close=lambda: None)

    def load(self, progress: Callable[[int, int], None]) -> LoadReport:
        return REPORT

    def launch(self, plan: StepPlan) -> Any:
        self.stepping.set()
        self.released.wait(30)
        raise GroupLost("the peers are gone")


@pytest.mark.parametrize("hangs", [True, False])
def test_whoever_has_started_the_rank_is_told_when_it_hangs(
    monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(serve, "ORPHAN_S", 0.2 if hangs else 20.0)
    engine, orphaned = Hanging(), threading.Event()
    ended: list[Exception] = []

    def rank(address: tuple[str, int]) -> None:
        try:
            serve_rank(address, Hello(0, 1, b""), lambda spec: cast(Engine, engine), orphaned.set)
        except GroupLost as error:
            ended.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=rank, args=(listener.getsockname()[:2],))
        thread.start()
        connection, _ = listener.accept()
    with connection:
        assert isinstance(read_from_rank(connection), Hello)
        connection.sendall(encode(Start(SPEC)))
        assert isinstance(read_from_rank(connection), LoadReport)
        if hangs:
            connection.sendall(encode(StepPlan(1, 0, [], [], [], [])))
            assert engine.stepping.wait(10)
    assert orphaned.wait(20 if hangs else 0) is hangs
    engine.released.set()
    thread.join(20)
    assert len(ended) == 1
    assert orphaned.is_set() is hangs
