"""The command `phalanx`, one subcommand for each module of `commands/`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from phalanx.protos.errors import ConfigError, InvalidArgument, ModelError, PhalanxError

from .commands.bench import bench
from .commands.cluster import cluster
from .commands.demo import demo
from .commands.explain import explain
from .commands.generate import chat, generate
from .commands.kernels import kernels
from .commands.models import models
from .commands.plan import plan
from .commands.restart import restart
from .commands.scale import scale
from .commands.serve import serve
from .commands.simulate import simulate
from .commands.status import status
from .commands.token import token

REFUSED, FAILED, INTERRUPTED = 2, 1, 130


class PlainErrors(TyperGroup):
    """Turns expected errors into one line on stderr and an exit code, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except PhalanxError as error:
            refused = isinstance(error, ConfigError | ModelError | InvalidArgument)
            _fail(str(error), REFUSED if refused else FAILED)
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except BrokenPipeError:  # the reader of our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code) from None


app = typer.Typer(
    cls=PlainErrors,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"phalanx {version('phalanx')}")
        raise typer.Exit


@app.callback()
def phalanx(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve a large language model from several processes or GPUs as one.

    New here? Run [bold]phalanx demo[/bold], then [bold]phalanx serve smollm2 --tp 2[/bold] and, in
    a second terminal, [bold]phalanx chat[/bold].
    """


for command in (
    demo,
    serve,
    chat,
    generate,
    status,
    restart,
    scale,
    explain,
    token,
    plan,
    models,
    simulate,
):
    app.command()(command)

measuring = typer.Typer(rich_markup_mode="rich")
measuring.callback(invoke_without_command=True)(bench)
measuring.command()(kernels)
measuring.command()(cluster)
app.add_typer(measuring, name="bench")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="phalanx")
