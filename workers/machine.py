"""What this process may use of its machine, containers' limits included. Imports no torch."""

from __future__ import annotations

import gc
import os
import platform
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
CPUINFO = Path("/proc/cpuinfo")
READ_BYTES = 1 << 22
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def cpu_count(cgroup: Path = CGROUP) -> int:
    """Cores that this process may keep busy, at least 1: affinity, and the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    words = _words(cgroup / "cpu.max")
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        cores = min(cores, int(words[0]) // int(words[1]))
    return max(cores, 1)


def memory_available(cgroup: Path = CGROUP) -> int:
    """Bytes that this process could still take: of the machine, and of its control group.

    File pages that the group could give back count as available, as they do for the machine.
    """
    free = int(psutil.virtual_memory().available)
    limit, used = _words(cgroup / "memory.max"), _words(cgroup / "memory.current")
    if len(limit) == 1 and limit[0].isdigit() and len(used) == 1:
        held = int(used[0]) - _statistic(cgroup / "memory.stat", "inactive_file")
        free = min(free, max(int(limit[0]) - held, 0))
    return free


def fast_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies bfloat16 natively."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(("flags", "Features")):
                    return bool(BFLOAT16_FLAGS & set(line.split(":", 1)[1].split()))
    except OSError:
        return False
    return False


def shared_memory_works() -> bool:
    """Ordered stores and a place for files without names: what `shared_memory.py` needs."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        with open("/dev/shm", opener=_nameless) as file:
            os.close(os.open(f"/proc/{os.getpid()}/fd/{file.fileno()}", os.O_RDWR))
    except OSError:
        return False
    return True


def _nameless(path: str, flags: int) -> int:
    return os.open(path, os.O_TMPFILE | os.O_RDWR, 0o600)


def interface_of(address: str) -> str:
    """The network interface with this address; the loopback one where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address == address for item in addresses):
            return name
    return "lo"


def _words(path: Path) -> list[str]:
    """The words of a small file; none when it is not there."""
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []


def _statistic(path: Path, name: str) -> int:
    words = _words(path)
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    return int(pairs.get(name, 0))


def read_ahead(checkpoint: str) -> int:
    """Read a checkpoint's weights once, so that the system holds them; returns the bytes."""
    path, total = Path(checkpoint), 0
    buffer = bytearray(READ_BYTES)
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total


def settle() -> None:
    """What was loaded lives as long as the process: no collection looks through it again."""
    gc.collect()
    gc.freeze()
