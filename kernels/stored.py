"""Packed weights as bytes, for files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from .interface import KernelBackend, PackedLinear


class StoredArray(NamedTuple):
    """A run of bytes in a file."""

    offset: int
    size: int
    digest: int
    """Of the bytes, as `WeightStorage.digest` has it: 64 bits that tell damage, but not malice."""


class StoredLinear(NamedTuple):
    """A packed weight in a file. What the numbers and names mean is the backend's business."""

    kind: tuple[str, int, int]
    shape: tuple[int, int]
    arrays: tuple[StoredArray, ...]


class Contents(NamedTuple):
    """What a packed weight consists of; the memory is the weight's own and lives as long."""

    kind: tuple[str, int, int]
    shape: tuple[int, int]
    arrays: tuple[memoryview, ...]


class WeightStorage(Protocol):
    """Takes a backend's packed weights apart, and reads them back into memory."""

    @property
    def layout(self) -> str:
        """Names all that decides what a weight's bytes are, beside the weight: packed by another
        build of the library or for another processor, they may differ."""

    def contents(self, packed: PackedLinear) -> Contents | None:
        """None for a weight that this backend has not packed by itself."""

    def is_costly(self, contents: Contents) -> bool:
        """Whether packing it takes much longer than reading so many bytes."""

    def digest(self, data: memoryview) -> int:
        """See `StoredArray`."""

    def restore(self, file: int, stored: Sequence[StoredLinear]) -> list[PackedLinear] | None:
        """Read them from an open file: all, or None where one is short or damaged."""

    def read(self, file: int, array: StoredArray, into: Tensor) -> bool:
        """Read as many bytes as a contiguous tensor has; whether they were there and whole."""


@runtime_checkable
class StoringBackend(KernelBackend, Protocol):
    """A backend whose packed weights can be kept in files."""

    @property
    def storage(self) -> WeightStorage:
        """What does it."""
