"""`phalanx token`: a bearer token, and the line of it that servers read."""

from __future__ import annotations

import hashlib
import os
import secrets
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from phalanx.protos.errors import ConfigError

TOKEN_BYTES = 32


class RoleName(StrEnum):
    """What the token's bearer may do."""

    user = "user"
    admin = "admin"


def token(
    tenant: Annotated[str, typer.Argument(help="Whose token it is.")],
    role: Annotated[
        RoleName, typer.Option(help="admin may also see the whole cluster.")
    ] = RoleName.user,
    add_to: Annotated[
        Path | None,
        typer.Option(help="The server's token file, to which the line is added.", metavar="FILE"),
    ] = None,
) -> None:
    """Make a bearer token. It is shown once; servers know its SHA-256 only.

    [bold]phalanx token team-a --add-to tokens[/bold]  a running server reads it within a second

    [bold]phalanx token ops --role admin --add-to tokens[/bold]
    """
    from phalanx.controller.server.security import TENANT

    if not TENANT.fullmatch(tenant):
        raise ConfigError(f"tenant is {tenant!r:.80}, allowed: 1 to 64 letters, digits and . _ -")
    made = secrets.token_urlsafe(TOKEN_BYTES)
    line = f"{tenant}:{hashlib.sha256(made.encode()).hexdigest()}:{role.value}"
    if add_to is None:
        typer.echo(f"line of the token file: {line}", err=True)
    else:
        _append(add_to, line)
    typer.echo(made)


def _append(path: Path, line: str) -> None:
    """Put the line into place with a whole new file, so that no reader sees half of it."""
    from phalanx.controller.server.security import TokenTable

    known = ""
    if path.exists():
        TokenTable.read(str(path))
        known = path.read_text(encoding="utf-8")
    known += "" if known.endswith("\n") or not known else "\n"
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{known}{line}\n")
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"add_to is {str(path)!r}: cannot be written: {error.strerror}") from None
