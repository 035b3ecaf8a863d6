"""`phalanx plan`: what every rank would hold, before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.controller.config import RULES
from phalanx.controller.settings import load_config

from .flags import config_flags

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table

    from phalanx.controller.cluster.placement import MemoryPlan, RankMemory
    from phalanx.protos.shards import RankCut
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
    "state_slots",
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
    served = resolve_model(config.model, config.max_context, config.chat_template)
    memory = plan_unplaced(config, served)
    console = Console(highlight=False)
    spec = served.spec
    console.print(
        f"[bold]{served.name}[/] ({spec.family}): {spec.num_layers} layers, {_heads(spec)}, "
        f"weights {memory.dtype}"
        + (f", KV cache {memory.cache.dtype}" if spec.attention_layers else "")
    )
    console.print(rank_table(spec, memory))
    if slots := memory.cache.num_states:
        console.print(f"States: [bold]{slots}[/] slots for running requests and past prompts")
    if not spec.attention_layers:
        return
    contexts = memory.kv_tokens / served.max_context
    console.print(
        f"KV cache: [bold]{memory.kv_tokens}[/] tokens in {memory.cache.num_blocks} blocks of "
        f"{memory.cache.block_size}: {contexts:.1f} requests of {served.max_context} tokens, or "
        f"{memory.kv_tokens // 1024} of 1024",
        soft_wrap=True,
    )


def _layers(memory: MemoryPlan, stage: int) -> str:
    layers = memory.stages[stage].layers
    return f"{layers.start}-{layers.stop - 1}"


def _heads(spec: DecoderSpec) -> str:
    parts = []
    if spec.attention_layers:
        parts.append(f"{spec.num_heads} query and {spec.num_kv_heads} key/value heads")
    if spec.state is not None:
        kind = "heads" if spec.state.heads else "channels"
        parts.append(f"{spec.state.units} {kind} of {spec.state.state_size} states")
    return ", ".join(parts)


def rank_table(spec: DecoderSpec, memory: MemoryPlan) -> Table:
    """One line a rank: its part of every dimension, and its bytes."""
    from phalanx.protos.shards import cut_model

    from .terminal import format_bytes, plain_table

    table = plain_table()
    pages, states = spec.attention_layers > 0, spec.state is not None
    tp_size, staged = len(memory.ranks) // len(memory.stages), len(memory.stages) > 1
    columns: list[tuple[str, bool, Callable[[RankMemory, RankCut], str]]] = [
        ("rank", True, lambda rank, part: str(rank.rank)),
        (
            "layers",
            staged,
            lambda rank, part: _layers(memory, rank.rank // tp_size),
        ),
        ("heads", pages, lambda rank, part: str(part.heads.query.size)),
        ("KV\nheads", pages, lambda rank, part: str(part.heads.kv.size)),
        ("MLP\nwidth", pages, lambda rank, part: str(part.mlp.size)),
        (
            "state\nheads" if spec.state and spec.state.heads else "channels",
            states,
            lambda rank, part: str(part.state.units.size if part.state else 0),
        ),
        ("vocab\nrows", True, lambda rank, part: str(part.vocab.size)),
        ("weights", True, lambda rank, part: format_bytes(rank.weights)),
        ("KV a\ntoken", pages, lambda rank, part: format_bytes(rank.kv_per_token)),
        ("one\nstate", states, lambda rank, part: format_bytes(rank.state_slot)),
        (
            "tempo-\nrary" if staged else "temporary",
            True,
            lambda rank, part: format_bytes(rank.activations + rank.rope_table),
        ),
        ("KV cache", pages, lambda rank, part: format_bytes(rank.kv)),
        ("states", states, lambda rank, part: format_bytes(rank.states)),
        ("total", True, lambda rank, part: format_bytes(rank.total)),
    ]
    shown = [(name, value) for name, wanted, value in columns if wanted]
    for name, _ in shown:
        table.add_column(name, justify="right")
    for rank in memory.ranks:
        part = cut_model(spec, tp_size, rank.rank % tp_size)
        table.add_row(*(value(rank, part) for _, value in shown))
    return table
