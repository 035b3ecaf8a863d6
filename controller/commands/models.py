"""`phalanx models`: which families of models can be served."""

from __future__ import annotations

from typing import Annotated

import typer


def models(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print workers/FAMILIES.md.")
    ] = False,
) -> None:
    """List the model families, the formats they load from, and what was verified.

    [bold]phalanx models[/bold]

    A family is recognised by the field `architectures` of a checkpoint's config. Verified means
    equal to `transformers` on the same weights in float32, every token and log-probability, at
    these tensor-parallel sizes.
    """
    from rich.console import Console

    from phalanx.controller.model import families_document, known_families

    if markdown:
        typer.echo(families_document())
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, (record, features) in sorted(known_families().items()):
        console.print(f"[bold]{name}[/]: {record.models} ({', '.join(record.kinds)})")
        by_sizes: dict[tuple[int, ...], list[str]] = {}
        for feature, sizes in features.items():
            by_sizes.setdefault(sizes, []).append(feature)
        seen = [
            f"at TP {' '.join(map(str, sizes))}: {', '.join(names)}"
            for sizes, names in by_sizes.items()
        ]
        limits = [record.limits] if record.limits else []
        console.print(f"    [dim]{'; '.join([*(seen or ['not verified']), *limits])}[/]")
