"""A container's limits are lower than its machine's figures, and it is killed for ignoring them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from phalanx.workers.machine import cpu_count, fast_bfloat16, interface_of, memory_available

MIB = 2**20


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text(f"{64 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{40 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {30 * MIB}\ninactive_file {8 * MIB}\n")
    return tmp_path


def test_the_groups_limits_hold(cgroup: Path) -> None:
    assert cpu_count(cgroup) == 1
    assert memory_available(cgroup) == 32 * MIB


def test_a_part_of_a_core_still_counts_as_one(cgroup: Path) -> None:
    (cgroup / "cpu.max").write_text("50000 100000\n")
    assert cpu_count(cgroup) == 1


def test_a_full_group_has_nothing_left(cgroup: Path) -> None:
    (cgroup / "memory.current").write_text(f"{80 * MIB}\n")
    assert memory_available(cgroup) == 0


@pytest.mark.parametrize("text", ["max\n", "", "not a number"])
def test_without_a_limit_the_machine_counts(cgroup: Path, text: str) -> None:
    (cgroup / "memory.max").write_text(text)
    (cgroup / "cpu.max").write_text(f"{text.strip()} 100000\n")
    assert memory_available(cgroup) > 64 * MIB
    assert cpu_count(cgroup) == len(os.sched_getaffinity(0))


def test_without_a_group_the_machine_counts(tmp_path: Path) -> None:
    assert memory_available(tmp_path / "none") <= psutil.virtual_memory().total
    assert cpu_count(tmp_path / "none") >= 1


def test_the_processors_flags_tell_of_bfloat16(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags : fpu avx512f avx512_bf16 sse\n")
    assert fast_bfloat16(file)
    file.write_text("processor : 0\nflags : fpu avx512f avx512_bf16x sse\n")
    assert not fast_bfloat16(file)
    assert not fast_bfloat16(tmp_path / "none")


def test_the_loopback_interface_is_found_by_its_address() -> None:
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if "127.0.0.1" in {item.address for item in addresses}
    ]
    assert interface_of("127.0.0.1") in names
