"""`python -m phalanx.kernels.bench`: every kernel's time beside the device's ceilings, as JSON.

One line a measurement, as it is made: first the device, then its ceilings, then the kernels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from phalanx.kernels.select import select_backend

from .cases import SHAPES, cases
from .measure import GraphTimer, HostTimer, Timer, measure, measure_ceilings


def run(
    device: str, shape: str, dtype: str, kernels: str | None, tokens: int, context: int
) -> Iterator[dict[str, Any]]:
    """The measurements, one after the other."""
    backend, reason = select_backend(device, kernels)
    place, kind = torch.device(device), getattr(torch, dtype)
    timer: Timer = GraphTimer(place) if device == "cuda" else HostTimer()
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    threads = getattr(backend, "threads", torch.get_num_threads())
    yield {
        "device": name,
        "kernels": reason.removeprefix("kernels: "),
        "threads": None if device == "cuda" else threads,
        "shape": shape,
        "dtype": dtype,
        "torch": torch.__version__,
    }
    with torch.inference_mode():
        ceilings = measure_ceilings(place, kind, timer)
        yield ceilings._asdict()
        for case in cases(SHAPES[shape], backend, tokens=tokens, context=context):
            yield measure(case, backend, place, kind, timer, ceilings)._asdict()


def main(show: Callable[[str], None] = print) -> None:
    """Parse the flags and print."""
    parser = argparse.ArgumentParser(prog="phalanx.kernels.bench", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default=None)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", default=None, help="a backend, by name")
    parser.add_argument("--tokens", type=int, default=None, help="of a prefill")
    parser.add_argument("--context", type=int, default=1024, help="of a decoding sequence")
    words = parser.parse_args()
    if words.device == "cuda" and not cuda:
        parser.error("device is 'cuda', and torch sees no CUDA device")
    large = words.device == "cuda"
    shape = words.shape or ("llama-3.1-8b" if large else "smollm2-135m")
    tokens = words.tokens or (2048 if large else 256)
    for line in run(words.device, shape, words.dtype, words.kernels, tokens, words.context):
        show(json.dumps(line))


if __name__ == "__main__":
    main()
