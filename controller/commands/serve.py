"""`phalanx serve`: a cluster from start to a graceful stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from phalanx.controller.config import RULES, ClusterConfig
from phalanx.controller.settings import load_config

from .flags import config_flags

GCS_AWAY = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""For so long we go on without Ray's GCS, which steps do not need. An embedded one does not come back:
there it stays at Ray's minute, after which this process ends, and may start again."""
SERVE_FLAGS = tuple(name for name in RULES if name != "model")


@config_flags(*SERVE_FLAGS)
def serve(
    flags: dict[str, Any],
    model: Annotated[
        str | None, typer.Argument(help=f"{RULES['model'].help} May stand in the config file.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="TOML file of fields; flags win over it."),
    ] = None,
) -> None:
    """Serve a model over gRPC until Ctrl-C or SIGTERM; SIGHUP restarts its replicas in turn.

    [bold]phalanx serve smollm2[/bold]  one process

    [bold]phalanx serve smollm2 --tp 2[/bold]  every layer cut over two ranks

    [bold]phalanx serve ./my-model --tp 4 --replicas 2 --port 8000[/bold]

    [bold]phalanx serve smollm2 --openai-port 8000[/bold]  for clients of OpenAI's API, too

    [bold]phalanx serve --config cluster.toml[/bold]  the same names as the flags, with underscores
    """
    from phalanx.controller.logs import logged_to

    loaded = load_config(config, {"model": model} | flags)
    with logged_to(sys.stderr, loaded.log_format):
        asyncio.run(serve_until_stopped(loaded))


async def serve_until_stopped(config: ClusterConfig) -> None:
    """Start the cluster, say where it listens, and stop it at a signal or when it ends itself."""
    from rich.console import Console

    if config.ray_address is not None:
        os.environ.setdefault(GCS_AWAY, "3600")  # read when Ray is imported
    from phalanx.controller.app import start_cluster
    from phalanx.controller.garbage import settle

    console = Console(highlight=False)
    if config.insecure:
        console.print("[bold red]insecure[/]: anyone who reaches this address may use the model")
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    starting = asyncio.ensure_future(start_cluster(config, progress=console))

    def catch_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _on_signal, loop, number, stopping, starting)
        loop.add_signal_handler(signal.SIGHUP, _on_restart, starting)

    catch_signals()
    try:
        cluster = await starting
    except asyncio.CancelledError:
        console.print("stopped before it was ready")
        return
    settle()
    catch_signals()  # again: Ray puts a handler of its own, which prints a stack, before ours
    try:
        console.print(f"[bold green]ready[/] on [bold]{cluster.address}[/]", soft_wrap=True)
        if cluster.openai_url:
            console.print(f"OpenAI's API on {cluster.openai_url}", soft_wrap=True)
        if cluster.page_url:
            console.print(f"a page to chat on: {cluster.page_url}", soft_wrap=True)
        if cluster.metrics_address:
            scheme = "https" if config.metrics_needs_tls else "http"
            console.print(
                f"metrics on {scheme}://{cluster.metrics_address}/metrics", soft_wrap=True
            )
        console.print(f"try: phalanx chat --address {cluster.address}", soft_wrap=True)
        stop = asyncio.ensure_future(stopping.wait())
        end = asyncio.ensure_future(cluster.wait())
        done, pending = await asyncio.wait({stop, end}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if end in done:
            end.result()  # raises what ended the cluster
    finally:
        console.print("stopping; a second signal ends at once", soft_wrap=True)
        await cluster.stop()


def _on_restart(starting: asyncio.Future[Any]) -> None:
    """A rolling restart, once there is something to restart."""
    if starting.done() and not starting.cancelled() and starting.exception() is None:
        starting.result().restart()


def _on_signal(
    loop: asyncio.AbstractEventLoop,
    number: int,
    stopping: asyncio.Event,
    starting: asyncio.Future[Any],
) -> None:
    """The first signal stops gracefully; the next one finds the default behaviour again."""
    loop.remove_signal_handler(number)
    signal.signal(number, signal.SIG_DFL)
    stopping.set()
    starting.cancel()
