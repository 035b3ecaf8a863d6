"""Packed weights of the compiled library as bytes: see `phalanx.kernels.stored`."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phalanx.kernels.interface import PackedLinear
from phalanx.kernels.stored import Contents, StoredArray, StoredLinear

from .library import COMPACT, INT8, MOST_ARRAYS, Part, Stored, library_path
from .linear import NativeInt8Linear, NativeLinear, PackedWeight

if TYPE_CHECKING:
    from .native_backend import NativeBackend


class NativeStorage:
    """A `WeightStorage`. The kind of a weight is its dtype, what it was packed to, and what that
    came to (`Type` of native/common.h)."""

    def __init__(self, backend: NativeBackend) -> None:
        self._backend, self._library = backend, backend.library

    @property
    def layout(self) -> str:
        """The build, the instruction set, and whether bfloat16 is kept in 12 bits."""
        library, ours = library_path(), Path(__file__).with_name("linear.py")
        parts = [file.read_bytes() for file in (library, ours) if file is not None]
        build = hashlib.sha256(b"".join(parts)).hexdigest()
        compact = "compact" if self._backend.compact else "plain"
        return f"{self._backend.name} {self._backend.isa} {compact} {build}"

    def contents(self, packed: PackedLinear) -> Contents | None:
        """See `WeightStorage`."""
        if not isinstance(packed, PackedWeight):
            return None
        stored = Stored(matrix=packed.handle)
        self._library.phx_describe(ctypes.byref(stored))
        dtype = str(packed.dtype).removeprefix("torch.")
        views = (_view(part.data, part.bytes) for part in stored.parts)
        return Contents((dtype, packed.packed, stored.type), (stored.out, stored.in_), tuple(views))

    def is_costly(self, contents: Contents) -> bool:
        """What is kept in 12 bits: a second and more for a gigabyte."""
        return contents.kind[2] == COMPACT

    def digest(self, data: memoryview) -> int:
        """Computed without holding up anything else."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(data)) if len(data) else None
        return int(self._library.phx_digest(address, len(data)))

    def restore(self, file: int, stored: Sequence[StoredLinear]) -> list[PackedLinear] | None:
        """By all threads of the team."""
        table = (Stored * len(stored))(*map(_row, stored))
        if not self._library.phx_restore(self._backend.handle, file, table, len(stored)):
            return None
        made: list[PackedLinear] = []
        for row, linear in zip(table, stored, strict=True):
            dtype, packed, _ = linear.kind
            kind = NativeInt8Linear if packed == INT8 else NativeLinear
            place = (self._backend, getattr(torch, dtype), linear.shape, packed)
            made.append(kind.restored(*place, row.matrix))
        return made

    def read(self, file: int, array: StoredArray, into: Tensor) -> bool:
        """By all threads of the team."""
        if array.size != into.nbytes or not into.is_contiguous():
            return False
        part = Part(into.data_ptr(), *_place(array))
        return bool(self._library.phx_read(self._backend.handle, file, ctypes.byref(part), 1))


def _view(address: int | None, size: int) -> memoryview:
    if not address or not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _place(array: StoredArray) -> tuple[int, int, int]:
    return array.size, array.offset, array.digest


def _row(stored: StoredLinear) -> Stored:
    parts = [Part(None, *_place(array)) for array in stored.arrays]
    out, width = stored.shape
    return Stored(out, width, stored.kind[2], (Part * MOST_ARRAYS)(*parts))
