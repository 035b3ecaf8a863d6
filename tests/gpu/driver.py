"""Settles on a machine with a CUDA device what was written without one.

Each part takes a few minutes at most, prints a table, and writes it with all figures into OUT
(`--out`, else the environment's OUT, else build/gpu): NAME.json, and NAME.md.

    python tests/gpu/driver.py kernels         every kernel against the reference in float64
    python tests/gpu/driver.py engine          a model end to end against the CPU's reference
    python tests/gpu/driver.py two-ranks       two ranks on one device against one
    python tests/gpu/driver.py speed           Llama-3.1-8B's shape, as a share of the floor
    python tests/gpu/driver.py bench-kernels   every kernel as a share of the device's ceilings
    python tests/gpu/driver.py all             one after the other; exit code 1 if any failed

It runs from a checkout, without installing it, on Python 3.11 or newer with torch 2.11 and its
Triton. Beside them it needs numpy and msgspec, whose wheel may be carried:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform \
        manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels msgspec
    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python tests/gpu/driver.py all

Models are drawn: no checkpoint is read. With `--device cpu` all parts can be tried out anywhere, on
small shapes, where `speed` has no goals.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("protos", "kernels", "workers")
HERE = Path(__file__).resolve().parent


def make_importable() -> None:
    """Let `phalanx.*` mean this checkout's folders, here and in processes that are started."""
    links = Path(tempfile.mkdtemp(prefix="phalanx-")) / "phalanx"
    links.mkdir()
    for room in ROOMS:
        (links / room).symlink_to(ROOT / room)
    paths = [str(links.parent), str(HERE)]
    sys.path[:0] = paths
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([kept] if kept else [])])


Outcome = dict[str, Any]
"""`ok`, and `rows`: the table, each row of the same columns."""


def part(name: str) -> Callable[[argparse.Namespace], Outcome]:
    """The function of a part; its module is imported only when it runs."""
    import parts  # type: ignore[import-not-found]

    return getattr(parts, name.replace("-", "_"))  # type: ignore[no-any-return]


PARTS = ("kernels", "engine", "two-ranks", "speed", "bench-kernels")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    if not rows:
        return "nothing\n"
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def facts() -> dict[str, Any]:
    """What this ran on."""
    import torch

    cuda = torch.cuda.is_available()
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version[:6]}
    found["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def run_part(name: str, words: argparse.Namespace) -> bool:
    """Run it, write its files, print its table; whether it went well."""
    started = time.perf_counter()
    outcome = part(name)(words)
    outcome |= {"part": name, "seconds": time.perf_counter() - started, "machine": facts()}
    words.out.mkdir(parents=True, exist_ok=True)
    (words.out / f"{name}.json").write_text(json.dumps(outcome, indent=1))
    title = f"{name}: {'ok' if outcome['ok'] else 'FAILED'}, {outcome['seconds']:.0f} s"
    text = f"## {title}\n\n{outcome['machine']}\n\n{table(outcome['rows'])}\n"
    (words.out / f"{name}.md").write_text(text)
    print(text, flush=True)
    return bool(outcome["ok"])


def run_all(words: argparse.Namespace) -> bool:
    """Each part in a process of its own, so that one that dies leaves the others their turn."""
    flags = ["--out", str(words.out), "--device", words.device]
    ends = [
        subprocess.run([sys.executable, __file__, name, *flags], check=False).returncode
        for name in PARTS
    ]
    return not any(ends)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=(*PARTS, "all", "rank"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--kernels", help="a backend, by name; the device's own by default")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--collectives", default=None, help="two-ranks: how they add up")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--layers", type=int, default=32, help="speed: fewer, to try it out")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Exit code 0 = everything asked for went well."""
    words = arguments()
    make_importable()
    if words.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("device is 'cuda', and torch sees no CUDA device")
    if words.part == "rank":
        part("rank")(words)
        return
    well = run_all(words) if words.part == "all" else run_part(words.part, words)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
