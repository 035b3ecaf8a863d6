"""What does not start says why, soon, with an exit code, and leaves nothing behind."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

SERVE = [sys.executable, "-P", "-m", "phalanx.controller", "serve"]
FLAGS = ["--dtype", "float32", "--metrics-port", "off", "--kv-tokens", "2048"]


def test_a_port_that_is_taken_and_too_many_ranks_are_found_before_ranks_start(
    tiny_llama: Callable[..., Path],
) -> None:
    model = str(tiny_llama())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            "cannot be bound": ["--port", port],
            "tp_size is 7, allowed are 1 to 6": ["--port", "0", "--tp", "7"],
        }
        for words, flags in cases.items():
            done = subprocess.run(
                [*SERVE, model, *FLAGS, *flags],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 2
            assert words in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_dies_while_it_starts_ends_the_server(tiny_llama: Callable[..., Path]) -> None:
    server = subprocess.Popen(
        [*SERVE, str(tiny_llama()), *FLAGS, "--port", "0", "--tp", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    family = psutil.Process(server.pid)
    victim = None
    while victim is None:
        assert server.poll() is None
        ranks = [
            child
            for child in family.children(recursive=True)
            if child.name() == "ray::RankActor.run"
        ]
        victim = next(iter(ranks), None)
        time.sleep(0.005)
    everybody = family.children(recursive=True)
    victim.kill()
    killed = time.monotonic()
    _, said = server.communicate(timeout=60)
    assert time.monotonic() - killed < 30  # seconds on a quiet machine: 3
    assert server.returncode == 1
    assert re.search(r"error: .*rank", said), said
    _, left = psutil.wait_procs(everybody, timeout=20)
    assert [item for item in left if item.status() != psutil.STATUS_ZOMBIE] == []
