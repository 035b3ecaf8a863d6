"""A real cluster: Ray, two ranks in processes of their own, the demo model, gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from phalanx.controller.app import RunningCluster, start_cluster
from phalanx.controller.client import Client
from phalanx.controller.config import ClusterConfig

SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "tp": 2,
    "dtype": "float32",
    "port": 0,
    "metrics_port": 0,
    "kv_tokens": 8192,
    "max_tokens_per_step": 128,
    "log_level": "warning",
    "resume_grace_s": 2.0,  # clients that are killed do not come back
}


class LoopThread:
    """An event loop on a thread of its own, so that tests can use the blocking client."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@pytest.fixture(scope="package")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="package")
def cluster(loop_thread: LoopThread, smollm2_gguf: object) -> Iterator[RunningCluster]:
    """One cluster that all tests share; they must leave it as they found it."""
    running: RunningCluster = loop_thread.run(start_cluster(ClusterConfig(**SETTINGS)))
    yield running
    loop_thread.run(running.stop())


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[Client]:
    with Client(cluster.address, timeout=120) as connected:
        yield connected
