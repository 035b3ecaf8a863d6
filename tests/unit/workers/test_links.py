"""All-reduces of two ranks are timed, size by size."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from phalanx.workers import links
from phalanx.workers.shared_memory import supported


@pytest.mark.skipif(not supported(), reason="needs shared memory of x86-64")
def test_both_ends_time_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_CALLS", 5)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    sizes = [64, 4096]

    def end(rank: int) -> list[float]:
        own = listener if rank == 0 else None
        return links.time_all_reduces(rank, "127.0.0.1", port, "shm", sizes, own, 60)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(end, range(2))
    assert len(first) == len(second) == 2 and min(*first, *second) > 0
