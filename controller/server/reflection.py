"""Reflection over services whose messages are registered in several descriptor pools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor_pool import DescriptorPool

Found = TypeVar("Found")


class Descriptors:
    """The look-ups that reflection makes in a pool, answered by the first pool that knows.

    They raise `KeyError` for what none knows.
    """

    def __init__(self, pools: Sequence[DescriptorPool]) -> None:
        self._pools = tuple(pools)

    def _first(self, find: Callable[[DescriptorPool], Found]) -> Found:
        for pool in self._pools[:-1]:
            try:
                return find(pool)
            except KeyError:
                continue
        return find(self._pools[-1])

    def FindFileByName(self, name: str) -> Any:
        """A file by the name that it was compiled under."""
        return self._first(lambda pool: pool.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """The file that defines a service, message or method."""
        return self._first(lambda pool: pool.FindFileContainingSymbol(symbol))

    def FindMessageTypeByName(self, name: str) -> Any:
        """A message by its full name."""
        return self._first(lambda pool: pool.FindMessageTypeByName(name))

    def FindExtensionByNumber(self, message: Any, number: int) -> Any:
        """An extension of a message that was found here."""
        return message.file.pool.FindExtensionByNumber(message, number)

    def FindAllExtensions(self, message: Any) -> Any:
        """All extensions of a message that was found here."""
        return message.file.pool.FindAllExtensions(message)
