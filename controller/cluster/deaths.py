"""Whether a rank died for want of memory, as far as Ray or the kernel tells."""

from __future__ import annotations

import contextlib
from pathlib import Path

EVENTS = Path("/sys/fs/cgroup/memory.events")
VMSTAT = Path("/proc/vmstat")


def starved(words: str) -> bool:
    """Whether Ray's words are about memory: its own monitor has killed the process."""
    return "NODE_OUT_OF_MEMORY" in words or "OutOfMemory" in words or "memory monitor" in words


def oom_kills(events: Path = EVENTS, vmstat: Path = VMSTAT) -> int:
    """Processes that the kernel has killed for want of memory, in this control group, or on this
    machine where it is not told; 0 where nothing is."""
    for source in (events, vmstat):
        with contextlib.suppress(OSError, ValueError):
            for line in source.read_text(encoding="ascii").splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
    return 0
