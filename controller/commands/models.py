"""`phalanx models`: which families of models can be served."""

from __future__ import annotations


def models() -> None:
    """List the model families, the formats they load from, and what was verified.

    [bold]phalanx models[/bold]

    A family is recognised by the field `architectures` of a checkpoint's config. Verified means
    compared with `transformers` on the same weights.
    """
    from rich.console import Console

    from phalanx.controller.model import known_families

    console = Console(highlight=False, soft_wrap=True)
    for name, record in sorted(known_families().items()):
        console.print(f"[bold]{name}[/]: {record.models} ({', '.join(record.kinds)})")
        limits = f"; {record.limits}" if record.limits else ""
        console.print(f"    [dim]{record.verified}{limits}[/]")
