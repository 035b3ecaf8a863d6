"""A bad line between two network namespaces: packets come late, in another order, or never.

The kernel's `netem` in Python, for kernels without it: a process of its own has one end in each
namespace (TUN devices, without an Ethernet header) and passes packets on by a seeded plan. The line
ends with the process, and says then what it has done. Run as a script by `nodes.Cable`.
"""

from __future__ import annotations

import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES = 65536


@dataclass(frozen=True)
class Line:
    """How bad it is, each way."""

    delay_s: float = 0.025
    jitter_s: float = 0.005
    """Evenly around the delay: packets that are close pass each other."""
    loss: float = 0.05
    hurry: float = 0.05
    """This part of the packets is not delayed, so that it overtakes the others."""
    seed: int = 0


@dataclass
class Tally:
    """What became of the packets."""

    passed: int = 0
    lost: int = 0
    overtaken: int = 0
    """Passed after one that was sent later, the same way."""


def fate(line: Line, draw: random.Random) -> float | None:
    """Seconds until a packet arrives; None: never."""
    if draw.random() < line.loss:
        return None
    if draw.random() < line.hurry:
        return 0.0
    return max(line.delay_s + draw.uniform(-line.jitter_s, line.jitter_s), 0.0)


def device(name: str, space: str) -> int:
    """A TUN device in a namespace; it goes when the descriptor is closed."""
    end = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    for words in (["link", "set", name, "netns", space], ["-n", space, "link", "set", name, "up"]):
        subprocess.run(["ip", *words], check=True, capture_output=True)
    return end


def carry(ends: tuple[int, int], line: Line, until: int) -> Tally:
    """Pass packets between both ends until `until` can be read."""
    draw, tally = random.Random(line.seed), Tally()
    waiting: list[tuple[float, int, int, bytes]] = []
    sent, arrived = 0, {end: 0 for end in ends}
    across = {ends[0]: ends[1], ends[1]: ends[0]}
    while True:
        patience = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        ready, _, _ = select.select([*ends, until], [], [], patience)
        if until in ready:
            return tally
        for end in ready:
            while (packet := _read(end)) is not None:
                sent += 1
                delay = fate(line, draw)
                if delay is None:
                    tally.lost += 1
                else:
                    item = (time.monotonic() + delay, sent, across[end], packet)
                    heapq.heappush(waiting, item)
        while waiting and waiting[0][0] <= time.monotonic():
            _, number, end, packet = heapq.heappop(waiting)
            try:
                os.write(end, packet)
            except OSError:  # the device is down, or its queue is full
                tally.lost += 1
                continue
            tally.passed += 1
            tally.overtaken += number < arrived[end]
            arrived[end] = max(arrived[end], number)


def _read(end: int) -> bytes | None:
    try:
        return os.read(end, PACKET_BYTES)
    except BlockingIOError:
        return None


def main() -> None:
    """NAME and SPACE of both ends, then a `Line` as JSON; says "up", ends with its input."""
    first, first_space, second, second_space, line = sys.argv[1:]
    ends = device(first, first_space), device(second, second_space)
    print("up", flush=True)
    tally = carry(ends, Line(**json.loads(line)), sys.stdin.fileno())
    print(json.dumps(asdict(tally)), flush=True)


if __name__ == "__main__":
    main()
