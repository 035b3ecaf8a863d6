"""`python -m phalanx.kernels.bench`: every kernel's time beside the device's ceilings, as JSON.

One line a measurement, as it is made: first the device, then its ceilings, then the kernels. With
--check, kernels are compared with the reference in float64 instead: one line a case, and exit code 1
where one is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from phalanx.kernels.reference import ReferenceBackend
from phalanx.kernels.select import select_backend

from .cases import SHAPES, cases, odd_cases
from .measure import GraphTimer, HostTimer, Timer, compare, measure, measure_ceilings


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


LIMITS = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Of |x - r| / |r|, r in float64. Matrices in float32 must not be multiplied in TF32."""


def check(
    device: str, shape: str, dtype: str, kernels: str | None, tokens: int, context: int
) -> Iterator[dict[str, Any]]:
    """Each case, and odd ones at small sizes, against the reference."""
    backend, _ = select_backend(device, kernels)
    place, kind, limit = torch.device(device), getattr(torch, dtype), LIMITS[dtype]
    found = [*odd_cases(SHAPES["smollm2-135m"], place)]
    found += [*cases(SHAPES[shape], backend, tokens=tokens, context=context)]
    for case in found:
        if not case.exact:
            continue
        with torch.inference_mode():
            error = compare(case, backend, ReferenceBackend(), place, kind).error
        # not well where it is NaN
        yield {"kernel": case.kernel, "size": case.size, "dtype": dtype, "error": error} | {
            "limit": limit,
            "ok": error < limit,
        }


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
    parser.add_argument("--check", action="store_true", help="compare with the reference")
    words = parser.parse_args()
    if words.device == "cuda" and not cuda:
        parser.error("device is 'cuda', and torch sees no CUDA device")
    large = words.device == "cuda"
    shape = words.shape or ("llama-3.1-8b" if large else "smollm2-135m")
    tokens = words.tokens or (2048 if large else 256)
    work, well = check if words.check else run, True
    for line in work(words.device, shape, words.dtype, words.kernels, tokens, words.context):
        show(json.dumps(line))
        well &= bool(line.get("ok", True))
    if not well:
        sys.exit(1)


if __name__ == "__main__":
    main()
