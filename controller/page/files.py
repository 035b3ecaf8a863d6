"""The page's files, read once: what is not in this table is not served, whatever a path says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

KINDS = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is sent."""

    content: bytes
    kind: str
    tag: str
    """Its ETag."""


def read_files() -> dict[str, File]:
    """Path below the page's root to file; "/" is the page itself."""
    found = {}
    for item in files("phalanx.controller.page").joinpath("static").iterdir():
        ending = item.name.rpartition(".")[2]
        if ending in KINDS:
            content = item.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
            found[f"/{item.name}"] = File(content, KINDS[ending], tag)
    found["/"] = found.pop("/index.html")
    return found
