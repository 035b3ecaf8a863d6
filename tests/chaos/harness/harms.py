"""What is done to clusters. Each harm returns when it has happened."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from harness.scenarios import Harm
from harness.server import Server, stopped

CGROUPS = Path("/sys/fs/cgroup")
QUOTA_US = 100_000


async def kill(server: Server, harm: Harm) -> None:
    """SIGKILL a rank."""
    server.groups_lost += 1
    server.ranks()[harm.rank].kill()


async def kill_all(server: Server, harm: Harm) -> None:
    """SIGKILL every rank of the group."""
    server.groups_lost += 1
    for process in server.ranks().values():
        process.kill()


async def kill_next(server: Server, harm: Harm) -> None:
    """SIGKILL the ranks of the group after this one, while they load."""
    epoch = server.epoch
    async with asyncio.timeout(120):
        while server.epoch == epoch or len(server.ranks()) < server.topology.tp:
            await asyncio.sleep(0.01)
    await kill_all(server, harm)


async def stop(server: Server, harm: Harm) -> None:
    """SIGSTOP a rank, and SIGCONT some time after."""
    server.groups_lost += 1
    victim = server.ranks()[harm.rank]
    victim.suspend()
    asyncio.get_running_loop().call_later(harm.seconds, stopped, [victim])


def _signalled(number: int) -> Callable[[Server, Harm], Awaitable[None]]:
    async def send(server: Server, harm: Harm) -> None:
        server.groups_lost += 1
        server.ranks()[harm.rank].send_signal(number)

    return send


async def slow(server: Server, harm: Harm) -> None:
    """A tenth of a core for a rank, for a while."""
    victim = server.ranks()[harm.rank]
    with controlled("cpu", server.mark, victim) as group:
        (group / "cpu.cfs_period_us").write_text(str(QUOTA_US))
        (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US // 10))
        await asyncio.sleep(harm.seconds)


HOG = """
import sys, time
open("/proc/self/oom_score_adj", "w").write("-1000")
open(sys.argv[1], "w").write("0")
held = [bytearray(b"x" * 2**20) for _ in range(400)]
"""
"""Takes memory in a control group until the kernel ends somebody else there for it."""


async def memory(server: Server, harm: Harm) -> None:
    """The kernel ends a rank for want of memory: all are in one control group from their start."""
    server.groups_lost += 1
    group = server.memory_group()
    used = int((group / "memory.usage_in_bytes").read_text())
    before = [process for process in server.ranks().values()]
    (group / "memory.limit_in_bytes").write_text(str(used + 30 * 2**20))
    procs = str(group / "cgroup.procs")
    hog = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", HOG, procs)
    try:
        async with asyncio.timeout(60):
            while all(item.is_running() and item.status() != "zombie" for item in before):
                await asyncio.sleep(0.01)
    finally:
        hog.kill()
        await hog.wait()
        (group / "memory.limit_in_bytes").write_text("-1")


@contextlib.contextmanager
def controlled(kind: str, name: str, process: psutil.Process):  # type: ignore[no-untyped-def]
    """A control group with this process in it; it goes back where it was."""
    before = next(
        line.split(":")[2]
        for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
        if line.split(":")[1] == kind
    )
    group = CGROUPS / kind / f"phalanx-{name}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(process.pid))
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            (CGROUPS / kind / before.lstrip("/") / "cgroup.procs").write_text(str(process.pid))
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


async def controller(server: Server, harm: Harm) -> None:
    """SIGKILL the controller, and start it again as a supervisor would."""
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)


async def torn(server: Server, harm: Harm) -> None:
    """The same, and the write-ahead log ends in the middle of a commit."""
    await asyncio.to_thread(server.kill)
    journal = next(server.points.parent.glob("journal/*-wal"))
    with journal.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(max(size - 1000, 0))
    await asyncio.to_thread(server.start)


async def arm(server: Server, harm: Harm) -> None:
    """Arm a failpoint, and wait until it fires."""
    server.groups_lost += 1
    server.arm(harm.point, action=harm.action, after=harm.after, seconds=harm.seconds)
    async with asyncio.timeout(120):
        while not server.fired(harm.point):
            await asyncio.sleep(0.005)


async def arm_controller(server: Server, harm: Harm) -> None:
    """A failpoint kills the controller, which is started again; not waited for here."""
    server.arm(harm.point, action="kill", after=harm.after, seconds=harm.seconds)

    async def again() -> None:
        while server.alive:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(server.start)

    server.restarting = asyncio.create_task(again())  # type: ignore[attr-defined]


HARMS: dict[str, Callable[[Server, Harm], Awaitable[None]]] = {
    "kill": kill,
    "kill-all": kill_all,
    "kill-next": kill_next,
    "stop": stop,
    "abort": _signalled(signal.SIGABRT),
    "segv": _signalled(signal.SIGSEGV),
    "slow": slow,
    "memory": memory,
    "controller": controller,
    "torn": torn,
    "arm": arm,
    "arm-controller": arm_controller,
}
