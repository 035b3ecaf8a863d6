"""`phalanx plan`: what every rank would hold, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.controller.config import RULES, load_config

from .flags import config_flags

if TYPE_CHECKING:
    from rich.table import Table

    from phalanx.controller.cluster.placement import MemoryPlan
    from phalanx.protos.specs import DecoderSpec

PLAN_FLAGS = (
    "tp",
    "pp",
    "dtype",
    "kv_dtype",
    "memory_per_rank",
    "kv_tokens",
    "max_context",
    "block_size",
    "max_tokens_per_step",
    "max_running",
)


@config_flags(*PLAN_FLAGS)
def plan(
    model: Annotated[str, typer.Argument(help=RULES["model"].help)],
    flags: dict[str, Any],
) -> None:
    """Show how a model would be cut, and whether it fits. Reads headers only, starts nothing.

    [bold]phalanx plan smollm2 --tp 2[/bold]  the cut of 9 heads over two ranks

    [bold]phalanx plan ./my-model --tp 4 --memory-per-rank 16GiB[/bold]  how many tokens fit

    [bold]phalanx plan ./my-model --tp 4 --pp 2[/bold]  the layers in two stages, on eight ranks

    [bold]phalanx plan smollm2 --tp 2 --kv-tokens 65536 --dtype float32[/bold]  what that many need

    Without --memory-per-rank and --kv-tokens the KV cache is sized for one full context; less is
    refused, and --max-context makes it smaller. Exit code 2 says that it does not fit.
    """
    from rich.console import Console

    from phalanx.controller.cluster.sizing import plan_unplaced
    from phalanx.controller.model import resolve_model

    config = load_config(None, {"model": model} | flags)
    served = resolve_model(config.model, config.max_context)
    memory = plan_unplaced(config, served)
    console = Console(highlight=False)
    spec = served.spec
    console.print(
        f"[bold]{served.name}[/] ({spec.family}): {spec.num_layers} layers, {spec.num_heads} query "
        f"and {spec.num_kv_heads} key/value heads, weights {memory.dtype}, "
        f"KV cache {memory.cache.dtype}"
    )
    console.print(rank_table(spec, memory))
    contexts = memory.kv_tokens / served.max_context
    console.print(
        f"KV cache: [bold]{memory.kv_tokens}[/] tokens in {memory.cache.num_blocks} blocks of "
        f"{memory.cache.block_size}: {contexts:.1f} requests of {served.max_context} tokens, or "
        f"{memory.kv_tokens // 1024} of 1024",
        soft_wrap=True,
    )


def rank_table(spec: DecoderSpec, memory: MemoryPlan) -> Table:
    """One line a rank: its part of every dimension, and its bytes."""
    from phalanx.protos.shards import cut_model

    from .terminal import format_bytes, plain_table

    table = plain_table()
    tp_size, staged = len(memory.ranks) // len(memory.stages), len(memory.stages) > 1
    for name in (
        "rank",
        *(["layers"] if staged else []),
        "heads",
        "KV\nheads",
        "MLP\nwidth",
        "vocab\nrows",
        "weights",
        "KV a\ntoken",
        "tempo-\nrary" if staged else "temporary",
        "KV cache",
        "total",
    ):
        table.add_column(name, justify="right")
    for rank in memory.ranks:
        index, place = divmod(rank.rank, tp_size)
        part, layers = cut_model(spec, tp_size, place), memory.stages[index].layers
        table.add_row(
            str(rank.rank),
            *([f"{layers.start}-{layers.stop - 1}"] if staged else []),
            str(part.heads.query.size),
            str(part.heads.kv.size),
            str(part.mlp.size),
            str(part.vocab.size),
            format_bytes(rank.weights),
            format_bytes(rank.kv_per_token),
            format_bytes(rank.activations + rank.rope_table),
            format_bytes(rank.kv),
            format_bytes(rank.total),
        )
    return table
