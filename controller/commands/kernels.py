"""`phalanx bench kernels`: how near a machine's kernels come to what its device can do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.protos.errors import ConfigError, PhalanxError

if TYPE_CHECKING:
    from rich.table import Table

MODULE = "phalanx.kernels.bench"
REFUSED = 2


class Device(StrEnum):
    """Where kernels run."""

    cpu = "cpu"
    cuda = "cuda"


class Shape(StrEnum):
    """Whose sizes they are given."""

    smollm2 = "smollm2-135m"
    llama = "llama-3.1-8b"


def kernels(
    device: Annotated[
        Device | None, typer.Option(help="Where. \\[default: a GPU if there is one]")
    ] = None,
    shape: Annotated[
        Shape | None, typer.Option(help="Sizes. \\[default: llama-3.1-8b on a GPU]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Prefill. \\[default: 2048 on a GPU, else 256]")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before a decoded one.")] = 1024,
    output: Annotated[Path | None, typer.Option(help="Write a report, JSON.")] = None,
) -> None:
    """Measure every kernel of this machine beside what its device reaches at best.

    [bold]phalanx bench kernels[/bold]  on the GPU if there is one, else on the CPU

    [bold]phalanx bench kernels --device cpu --output kernels.json[/bold]  all figures in a file

    The ceilings are measured as well: bytes a second of a large copy and a large sum, operations
    a second of a large matrix product. A kernel's share is the time that its bytes or operations
    take at the ceiling, over the time that it took. Beyond 100 % it was helped by a cache. Run it
    on a machine that does nothing else.
    """
    from rich.console import Console

    from phalanx.controller.benchmark.report import check_writable

    if output:
        check_writable("output", output)
    words = ["--context", str(context)]
    for name, value in (("device", device), ("shape", shape), ("tokens", tokens)):
        words += [f"--{name}", str(value)] if value is not None else []
    console = Console(highlight=False, soft_wrap=True)
    with Console(stderr=True).status("measuring the ceilings") as status:
        lines = []
        for line in measured(words):
            lines.append(line)
            status.update(" ".join(str(line.get(key, "")) for key in ("kernel", "size")))
    machine, ceilings, *rows = lines
    console.print(
        f"{machine['device']}: {machine['kernels']}, {machine['shape']}, {machine['dtype']}"
    )
    console.print(
        f"copy {ceilings['copy'] / 1e9:.4g} GB/s, read {ceilings['read'] / 1e9:.4g} GB/s, "
        f"matrix {ceilings['matrix'] / 1e12:.4g} TFLOP/s"
    )
    console.print(kernels_table(rows))
    if output:
        report = {"machine": machine, "ceilings": ceilings, "kernels": rows}
        output.write_text(json.dumps(report, indent=1), encoding="utf-8")
        console.print(f"report: {output}")


def measured(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Lines of a process of its own: this one has no torch. Raises `ConfigError` for what it
    refuses, `PhalanxError` when it fails."""
    command = [sys.executable, "-P", "-m", MODULE, *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None or process.stderr is None:
            raise RuntimeError("the process is not piped")
        for line in process.stdout:
            yield json.loads(line)
        told = process.stderr.read().strip().splitlines() or ["no reason given"]
    if process.returncode == REFUSED:
        raise ConfigError(told[-1].partition("error: ")[2] or told[-1])
    if process.returncode:
        raise PhalanxError(f"{MODULE} ended with code {process.returncode}: {told[-1]}")


def kernels_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a kernel and size."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("kernel")
    table.add_column("size")
    for name in ("time", "GB/s", "TFLOP/s", "bound", "share"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            row["kernel"],
            row["size"],
            f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms",
            f"{row['bytes'] / seconds / 1e9:.4g}",
            f"{row['flops'] / seconds / 1e12:.3g}" if row["flops"] else "",
            row["bound"],
            f"{100 * row['share']:.0f} %",
        )
    return table
