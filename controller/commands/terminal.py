"""Printing model output on a terminal."""

from __future__ import annotations

import sys
import unicodedata

from rich.console import Console
from rich.table import Table


class Terminal:
    """Standard output for text as it streams.

    On a terminal, control characters are shown as a replacement mark, so that no model output can
    move the cursor or set colours. In a pipe the text passes unchanged.
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.notes = Console(stderr=True, highlight=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Write `text` at once, without a line end."""
        sys.stdout.write(printable(text) if self.console.is_terminal else text)
        sys.stdout.flush()


def printable(text: str) -> str:
    """`text` with every control character but line end and tab replaced by U+FFFD."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\ufffd"
        for character in text
    )


def plain_table(title: str | None = None) -> Table:
    """A table without lines, so that it fits a narrow terminal and reads well in a file."""
    return Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that keeps at least one whole: "1.5 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
