"""What the machine can do: reading memory, and multiplying bfloat16 matrices."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

READ_BYTES = 1 << 30
SIDE = 2048
TRIES = 5


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some tries."""
    work()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    """Print a line of JSON: bytes and operations a second, with all cores that we may use."""
    torch.set_num_threads(int(sys.argv[1]))
    numbers = torch.ones(READ_BYTES // 4)
    left, right = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    figures = {
        "read_bytes_per_s": READ_BYTES / best(numbers.sum),
        "bfloat16_flops": 2 * SIDE**3 / best(lambda: left @ right),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
