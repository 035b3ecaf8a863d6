"""`phalanx generate` and `phalanx chat`: text from a running cluster, as it is written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .flags import Connection, connection_flags, sampling_flags

if TYPE_CHECKING:
    from phalanx.controller.client import Client

    from .terminal import Terminal

HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short"


@sampling_flags
@connection_flags
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    connection: Connection,
    params: dict[str, Any],
) -> None:
    """Continue a text as it stands, without a chat template.

    [bold]phalanx generate "Once upon a time" --max-tokens 50[/bold]

    [bold]phalanx generate "1, 2, 3," --temperature 0 --stop 10[/bold]

    [bold]cat story.txt | phalanx generate - --seed 7[/bold]

    [bold]phalanx generate "The capital of France:" --regex " [A-Z][a-z]+"[/bold]
    """
    from phalanx.controller.client import Client

    from .terminal import Terminal

    text = sys.stdin.read() if prompt == "-" else prompt
    with Client(**connection.arguments()) as client:
        stream(client.generate(text, **params), Terminal())


@sampling_flags
@connection_flags
def chat(
    connection: Connection,
    params: dict[str, Any],
    message: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation begins.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="Instruction that stands before the conversation.")
    ] = None,
) -> None:
    """Talk with the model.

    [bold]phalanx chat[/bold]  a conversation; Ctrl-D leaves

    [bold]phalanx chat "What is the capital of France?" --temperature 0[/bold]  one answer

    [bold]phalanx chat "Is the sky blue?" --choice yes --choice no[/bold]  in a form of yours
    """
    from phalanx.controller.client import Client

    from .terminal import Terminal

    opening = [{"role": "system", "content": system}] if system else []
    with Client(**connection.arguments()) as client:
        if message is None:
            converse(client, Terminal(), opening, params)
        else:
            question = {"role": "user", "content": message}
            stream(client.chat([*opening, question], **params), Terminal())


def stream(answers: Iterable[Any], terminal: Terminal) -> str:
    """Write the pieces of sample 0 as they come; returns the whole text."""
    pieces: list[str] = []
    try:
        for answer in answers:
            for sample in answer.samples:
                if sample.index == 0 and sample.text:
                    pieces.append(sample.text)
                    terminal.write(sample.text)
    finally:
        if pieces:
            terminal.write("\n")
    return "".join(pieces)


def converse(
    client: Client, terminal: Terminal, opening: list[dict[str, str]], params: dict[str, Any]
) -> None:
    """Questions and answers until the end of input; a refused or cut answer does not end it."""
    from phalanx.protos.errors import PhalanxError, Unauthenticated

    terminal.notes.print(HELP, style="dim")
    messages = list(opening)
    while True:
        try:
            question = terminal.console.input("[bold cyan]you>[/] ").strip()
        except EOFError:
            terminal.write("\n")
            return
        if question == "/exit":
            return
        if question == "/clear":
            messages = list(opening)
        if question in ("", "/clear"):
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            answer = stream(client.chat(asked, **params), terminal)
        except KeyboardInterrupt:
            continue
        except Unauthenticated:
            raise
        except PhalanxError as error:
            terminal.notes.print(f"error: {error}", style="red", markup=False)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
