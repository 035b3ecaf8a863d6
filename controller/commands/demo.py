"""`phalanx demo`: a whole cluster, one question through gRPC, and everything stopped again."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.controller.config import ClusterConfig
from phalanx.controller.settings import load_config

from .flags import config_flags

if TYPE_CHECKING:
    from .terminal import Terminal

MODEL = "smollm2"
QUESTION = "What is the capital of France?"
MAX_TOKENS = 64
SETTINGS = {
    "tp": 2,
    "port": 0,
    "metrics_port": 0,
    "kv_tokens": 8192,
    "log_level": "warning",
    "weights_cache": "off",
}


@dataclass(frozen=True)
class Answer:
    """A finished answer; times in seconds since the question was sent."""

    text: str
    tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first one, by the time since it; None for a single token."""
        rest = self.total_s - self.first_token_s
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else None


@config_flags("tp", "pp", "dtype", "device", "threads", "collectives")
def demo(
    flags: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Model: smollm2, a folder or a .gguf file.")] = MODEL,
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
) -> None:
    """Start a cluster, ask it one question, show the answer, and stop. Takes --tp 2 by default.

    [bold]phalanx demo[/bold]

    [bold]phalanx demo --tp 3 --question "Why is the sky blue?"[/bold]
    """
    asyncio.run(run_demo(load_config(None, {"model": model} | SETTINGS | flags), question))


async def run_demo(config: ClusterConfig, question: str) -> Answer:
    """Start, ask, report, stop. The cluster is stopped also when something fails."""
    from phalanx.controller.app import start_cluster
    from phalanx.controller.client import AsyncClient

    from .terminal import Terminal

    terminal = Terminal()
    console = terminal.console
    console.print(f"[bold]Phalanx[/]: {config.model} on {config.ranks_per_replica} ranks")
    began = time.perf_counter()
    cluster = await start_cluster(config, progress=console)
    try:
        ready = time.perf_counter() - began
        console.print(f"[green]ready[/] on {cluster.address} after {ready:.1f} s\n")
        console.print("[bold cyan]question[/] ", end="")
        terminal.write(f"{question}\n")
        console.print("[bold cyan]answer[/]   ", end="")
        async with AsyncClient(address=cluster.address) as client:
            answer = await ask(client, question, terminal)
    finally:
        await cluster.stop()
    speed = answer.tokens_per_s
    rate = f", then {speed:.1f} tokens/s" if speed else ""
    console.print(f"\nfirst token after {answer.first_token_s * 1000:.0f} ms{rate}")
    console.print(f"{answer.tokens} tokens in {answer.total_s:.2f} s; everything stopped")
    return answer


async def ask(client: Any, question: str, terminal: Terminal) -> Answer:
    """One greedy chat answer, written to the terminal as it comes."""
    pieces, tokens, first = [], 0, 0.0
    began = time.perf_counter()
    messages = [{"role": "user", "content": question}]
    async for message in client.chat(messages, temperature=0.0, max_tokens=MAX_TOKENS):
        for sample in message.samples:
            if sample.token_ids and not tokens:
                first = time.perf_counter() - began
            tokens += len(sample.token_ids)
            pieces.append(sample.text)
            terminal.write(sample.text)
    total = time.perf_counter() - began
    terminal.write("\n")
    return Answer("".join(pieces), tokens, first, total)
