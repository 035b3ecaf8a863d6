"""Shared-memory collectives between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phalanx.protos.errors import ConfigError, GroupLost
from phalanx.workers.shared_memory import SharedMemoryRank, supported

pytestmark = pytest.mark.skipif(not supported(), reason="needs x86 and /dev/shm")

SLOT_BYTES = 4096
DTYPES = ["float32", "bfloat16", "float64", "int64"]
SHAPES = [[0], [0, 5], [], [1], [7], [3, 5], [33, 31], [1025], [2, 999], [64, 48]]
"""The last ones are larger than a slot for every dtype, or for the wide ones."""

RANK = """
import os, sys, time
from datetime import timedelta
from pathlib import Path

import torch

from phalanx.protos.errors import GroupLost
from phalanx.workers.shared_memory import SharedMemoryRank

folder, rank, size, work = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)


def wait_for(path):
    while not path.exists():
        time.sleep(0.002)
    return path


def exchange(value):
    if rank == 0:
        (folder / "part").write_bytes(value)
        (folder / "part").rename(folder / "segment")
    return wait_for(folder / "segment").read_bytes()


def barrier():
    (folder / f"opened-{rank}").touch()
    for other in range(size):
        wait_for(folder / f"opened-{other}")


group = SharedMemoryRank.join(
    rank, size, int(sys.argv[5]), exchange, barrier, timedelta(seconds=float(sys.argv[6]))
)
calls = torch.load(folder / "calls.pt")
answers = []
try:
    for turn, tensors in enumerate(calls):
        if work == "die" and rank == 1 and turn == 3:
            os.kill(os.getpid(), 9)
        own = tensors[rank]
        answers.append((group.all_reduce(own.clone()), group.all_gather(own)))
except GroupLost as error:
    (folder / f"lost-{rank}").write_text(str(error))
torch.save(answers, folder / f"answers-{rank}.pt")
"""


def run_ranks(
    folder: Path, calls: list[list[Tensor]], size: int, work: str = "live", timeout_s: float = 60
) -> list[int]:
    """Run `size` processes over `calls`; their exit codes. A rank that hangs fails the test."""
    torch.save(calls, folder / "calls.pt")
    script = folder / "rank.py"
    script.write_text(RANK)
    ranks = []
    for rank in range(size):
        arguments = [str(folder), str(rank), str(size), work, str(SLOT_BYTES), str(timeout_s)]
        ranks.append(subprocess.Popen([sys.executable, str(script), *arguments]))
    try:
        return [process.wait(timeout=60) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


def some(shape: list[int], dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == "int64":
        return torch.randint(-(2**61), 2**61, shape, generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).to(
        getattr(torch, dtype)
    )


def in_rank_order(tensors: list[Tensor]) -> Tensor:
    """The sum as it is specified: 16-bit types in float32, rounded once."""
    narrow = tensors[0].dtype is torch.bfloat16
    total = tensors[0].float() if narrow else tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + (tensor.float() if narrow else tensor)
    return total.to(tensors[0].dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_maxima_have_equal_bits_on_every_rank(tmp_path: Path, size: int) -> None:
    """Every dtype at every size, and many turns of one size, where a fast rank could run ahead."""
    cases = [(shape, dtype) for dtype in DTYPES for shape in SHAPES]
    cases += [([257], "bfloat16")] * 300
    calls = [
        [some(shape, dtype, seed=1000 * number + rank) for rank in range(size)]
        for number, (shape, dtype) in enumerate(cases)
    ]
    assert run_ranks(tmp_path, calls, size) == [0] * size
    answers = [torch.load(tmp_path / f"answers-{rank}.pt") for rank in range(size)]
    for number, tensors in enumerate(calls):
        for rank in range(size):
            total, stacked = answers[rank][number]
            assert same_bits(total, in_rank_order(tensors)), (cases[number], rank)
            assert same_bits(stacked, torch.stack(tensors)), (cases[number], rank)
            if stacked.numel():
                assert same_bits(stacked.amax(0), torch.stack(tensors).amax(0))
    segment = (tmp_path / "segment").read_text()
    # an open file of rank 0's, which never had a name that could stay behind
    assert segment.startswith("/proc/") and not os.path.exists(segment)


def test_a_killed_peer_is_reported_as_group_lost(tmp_path: Path) -> None:
    calls = [[some([16], "float32", seed=rank) for rank in range(2)] for _ in range(6)]
    codes = run_ranks(tmp_path, calls, 2, work="die", timeout_s=0.5)
    assert codes == [0, -signal.SIGKILL]
    assert "rank 1" in (tmp_path / "lost-0").read_text()
    assert len(torch.load(tmp_path / "answers-0.pt")) == 3
    assert not os.path.exists((tmp_path / "segment").read_text())


def join_alone(
    exchange: Callable[[bytes], bytes], barrier: Callable[[], Any], slot_bytes: int = 64
) -> SharedMemoryRank:
    return SharedMemoryRank.join(0, 2, slot_bytes, exchange, barrier, timedelta(seconds=0.05))


def test_nothing_stays_behind_when_a_peer_fails_to_open() -> None:
    told: list[str] = []

    def exchange(value: bytes) -> bytes:
        told.append(value.decode())
        assert os.path.exists(told[0])
        return value

    def barrier() -> None:
        raise RuntimeError("a peer did not come")

    with pytest.raises(RuntimeError, match="did not come"):
        join_alone(exchange, barrier)
    assert not os.path.exists(told[0])


def test_a_segment_without_room_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("phalanx.workers.shared_memory.FOLDER", str(tmp_path))
    with pytest.raises(ConfigError, match=f"has no room for the {128 + 4 * 2**58} bytes"):
        join_alone(lambda value: value, lambda: None, slot_bytes=2**58)
    assert not list(tmp_path.iterdir())


def test_a_peer_that_never_comes_is_named() -> None:
    group = join_alone(lambda value: value, lambda: None)
    with pytest.raises(GroupLost, match="rank 1 did not come to collective 1"):
        group.all_reduce(torch.ones(3))
