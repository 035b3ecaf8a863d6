"""Python's garbage collector, in a process that serves."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 20_000
"""So many more objects than before, and the young ones are looked through."""


def settle() -> None:
    """To be called by who owns the process, once all is there that lives as long as it does.

    That is not looked through again. What requests leave behind goes by counts of references;
    collections for the few cycles among it come seldom, since a full one stops every stream.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
