"""A cluster and its clients as commands see them, without a cluster."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any, Self

import pytest
from typer.testing import CliRunner

from phalanx.controller.cli import app
from phalanx.protos.v1 import serving_pb2, types_pb2

Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("plan", "smollm2", input=...)`: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("PHALANX_ADDRESS", "PHALANX_TOKEN_FILE", "PHALANX_TLS_CA"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*words: str, input: str | None = None) -> Any:
        return CliRunner().invoke(app, list(words), input=input, prog_name="phalanx")

    return invoke


class FakeClient:
    """Stands for both clients. stages: the cluster's ranks are stages of one replica."""

    stages = False

    def __init__(self, answers: list[list[Any]], connection: dict[str, Any]) -> None:
        self.answers, self.connection = answers, connection
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def stream(self, prompt: Any, params: dict[str, Any]) -> Iterator[Any]:
        self.calls.append((prompt, params))
        pieces = self.answers.pop(0)
        for number, piece in enumerate(pieces):
            if isinstance(piece, BaseException):
                raise piece
            sample = types_pb2.SampleDelta(text=piece, token_ids=[1])
            if number == len(pieces) - 1:
                sample.finish_reason = types_pb2.FINISH_REASON_STOP
            yield serving_pb2.ChatResponse(samples=[sample])

    def generate(self, prompt: Any, **params: Any) -> Iterator[Any]:
        return self.stream(prompt, params)

    def chat(self, messages: Any, **params: Any) -> Iterator[Any]:
        return self.stream(messages, params)

    def model_info(self) -> Any:
        return serving_pb2.GetModelInfoResponse(
            name="tiny", family="llama", dtype="float32", max_context=512, vocab_size=40
        )

    def cluster_state(self) -> Any:
        ranks = [
            types_pb2.RankState(rank=0, node="alpha", device="cpu", head_start=0, head_stop=6),
            types_pb2.RankState(rank=1, node="beta", device="cpu", head_start=6, head_stop=9),
        ]
        if self.stages:
            for rank in ranks:
                rank.stage, rank.layer_start = rank.rank, 7 * rank.rank
                rank.layer_stop = rank.layer_start + 7
        replica = types_pb2.ReplicaState(replica_id="replica-0", state="ready", ranks=ranks)
        replica.kv_blocks_total, replica.kv_blocks_free, replica.kv_block_tokens = 10, 4, 16
        replica.prefix_queried_tokens, replica.prefix_hit_tokens = 200, 50
        return serving_pb2.GetClusterStateResponse(replicas=[replica], queued_requests=3)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        pass


class FakeAsyncClient(FakeClient):
    """The same, for `async with` and `async for`."""

    async def _stream(self, prompt: Any, params: dict[str, Any]) -> AsyncIterator[Any]:
        for message in self.stream(prompt, params):
            yield message

    def generate(self, prompt: Any, **params: Any) -> Any:
        return self._stream(prompt, params)

    def chat(self, messages: Any, **params: Any) -> Any:
        return self._stream(messages, params)

    async def model_info(self) -> Any:
        return super().model_info()

    async def cluster_state(self) -> Any:
        return super().cluster_state()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        pass


class Clients(list[FakeClient]):
    """The clients that commands make, in order. `answers` are the texts that they stream, one list
    a request; an exception among them is raised there."""

    kind = FakeClient

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[list[Any]] = []

    def make(self, kind: type[FakeClient]) -> Callable[..., FakeClient]:
        """A constructor as commands call it."""

        def client(**connection: Any) -> FakeClient:
            self.append(kind(self.answers, connection))
            return self[-1]

        return client


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Clients:
    """Takes the place of the client module."""
    made = Clients()
    module = SimpleNamespace(Client=made.make(FakeClient), AsyncClient=made.make(FakeAsyncClient))
    monkeypatch.setitem(sys.modules, "phalanx.controller.client", module)
    return made


class FakeCluster:
    """A cluster that is up until it is stopped, or until `lost` is raised."""

    def __init__(self) -> None:
        self.address, self.metrics_address = "127.0.0.1:1234", None
        self.openai_url: str | None = None
        self.page_url: str | None = None
        self.config: Any = None
        self.stopped = 0
        self.lost: Exception | None = None
        self.after_start: Callable[[], None] = lambda: None

    async def wait(self) -> None:
        self.after_start()
        if self.lost:
            raise self.lost
        await asyncio.Event().wait()

    async def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """What `start_cluster` gives."""
    fake = FakeCluster()

    async def start_cluster(config: Any, *, progress: Any = None) -> FakeCluster:
        fake.config = config
        return fake

    module = SimpleNamespace(start_cluster=start_cluster)
    monkeypatch.setitem(sys.modules, "phalanx.controller.app", module)
    return fake
