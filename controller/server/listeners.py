"""What listens, and who gets in there."""

from __future__ import annotations

from dataclasses import dataclass

from .security import TlsFiles


@dataclass(frozen=True, slots=True)
class Listener:
    """One address. tls: "off", "on" or "mutual"; auth: "none", "token", "certificate" or
    "token and certificate"."""

    address: str
    protocol: str
    tls: str
    auth: str


def encryption(files: TlsFiles | None) -> str:
    """How traffic is hidden."""
    return "off" if files is None else "on" if files.client_ca is None else "mutual"


def authentication(tokens: bool, files: TlsFiles | None) -> str:
    """What callers must show."""
    shown = ["token"] if tokens else []
    shown += ["certificate"] if files is not None and files.client_ca is not None else []
    return " and ".join(shown) or "none"
