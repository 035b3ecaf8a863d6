"""A strict reader of GGUF files, versions 2 and 3, little-endian.

Every count, length and size that the header claims is checked against the size of the file before
anything is allocated. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from phalanx.protos.errors import ModelError

from .slices import Array, bounds, rectangle

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 255
MAX_STRING_BYTES = 16 * 1024 * 1024
MAX_ARRAY_DEPTH = 2
MAX_ITEMS = 4 * 1024 * 1024  # of an array, or entries of a table
MAX_ALIGNMENT = 64 * 1024
DEFAULT_ALIGNMENT = 32
MIN_ENTRY_BYTES = 8 + 1 + 4 + 1  # key length, one character, type, a one-byte value
MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
CHUNK_ELEMENTS = 64 * 1024  # dequantised at a time: what that takes stays in the cache


class TensorType(NamedTuple):
    """A storage type: `size` bytes hold a block of `block` elements of one row."""

    name: str
    block: int
    size: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
_PLAIN = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` is row-major, `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


class _Cursor:
    """Reads the header from front to back and never past the end."""

    def __init__(self, data: memoryview, file: str) -> None:
        self._data, self.file, self.position = data, file, 0

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.file}: {what}")

    @property
    def remaining(self) -> int:
        return len(self._data) - self.position

    def take(self, size: int, what: str) -> memoryview:
        if size > self.remaining:
            raise self.fail(
                f"{what} needs {size} bytes at {self.position}, the file has {self.remaining} left"
            )
        self.position += size
        return self._data[self.position - size : self.position]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def count(self, what: str, least_bytes: int) -> int:
        """A number of items that take at least `least_bytes` each."""
        count, room = self.u64(what), min(self.remaining // least_bytes, MAX_ITEMS)
        if count > room:
            raise self.fail(f"{what} is {count}, the file has room for {room}")
        return count

    def text(self, what: str, most_bytes: int = MAX_STRING_BYTES) -> str:
        size = self.u64(what)
        if size > most_bytes:
            raise self.fail(f"{what} is a text of {size} bytes, allowed are {most_bytes}")
        raw = self.take(size, what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} is not UTF-8 text") from None

    def texts(self, count: int, what: str) -> list[str]:
        """So many texts, as `text` reads them: a vocabulary has a hundred thousand."""
        data, found = self._data, []
        for _ in range(count):
            start = self.position + _LENGTH.size
            size = _LENGTH.unpack_from(data, self.position)[0] if start <= len(data) else 0
            if start + size > len(data) or size > MAX_STRING_BYTES:
                self.text(what)  # says what is wrong
            try:
                found.append(str(data[start : start + size], "utf-8"))
            except UnicodeDecodeError:
                self.text(what)
            self.position = start + size
        return found

    def name(self, what: str) -> str:
        name = self.text(what, MAX_NAME_BYTES)
        if not name or not name.isprintable():
            raise self.fail(f"{what} is {name!r}, a name of printable characters is needed")
        return name

    def value(self, kind: int, what: str, depth: int = 0) -> object:
        if kind == _STRING:
            return self.text(what)
        if kind == _BOOL:
            return bool(self._flags(1, what)[0])
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == _ARRAY:
            return self._array(what, depth + 1)
        raise self.fail(f"{what} has value type {kind}, allowed are 0 to 12")

    def _flags(self, count: int, what: str) -> Array:
        flags = np.frombuffer(self.take(count, what), np.uint8)
        if count and int(flags.max()) > 1:
            raise self.fail(f"{what} holds {int(flags.max())}, a bool is 0 or 1")
        return flags.astype(np.bool_)

    def _array(self, what: str, depth: int) -> object:
        if depth > MAX_ARRAY_DEPTH:
            raise self.fail(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        kind = self.u32(what)
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            count = self.count(f"length of {what}", dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype).copy()
        if kind == _BOOL:
            return self._flags(self.count(f"length of {what}", 1), what)
        if kind == _STRING:
            return self.texts(self.count(f"length of {what}", _LENGTH.size), what)
        count = self.count(f"length of {what}", 12)
        return [self.value(kind, what, depth) for _ in range(count)]


class GgufFile:
    """An open GGUF file: metadata, where its tensors lie, and their values by slice.

    Arrays of numbers in `metadata` are numpy arrays, arrays of texts are lists.
    Raises `ModelError` for anything malformed or of an unsupported tensor type.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = Path(path).name
        self._bytes = _map(Path(path), self.file)
        cursor = _Cursor(memoryview(self._bytes), self.file)  # type: ignore[arg-type]
        tensor_count, entries = _read_start(cursor)
        self.metadata = _read_metadata(cursor, entries)
        self.alignment = self._alignment(cursor)
        self.tensors = _read_tensors(cursor, tensor_count, self.alignment)

    def _alignment(self, cursor: _Cursor) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        power = isinstance(value, int) and 8 <= value <= MAX_ALIGNMENT and not value & (value - 1)
        if not isinstance(value, int) or isinstance(value, bool) or not power:
            raise cursor.fail(
                f"general.alignment is {value!r}, allowed are powers of two from 8 to "
                f"{MAX_ALIGNMENT}"
            )
        return value

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Array:
        """Values of a one- or two-dimensional tensor, cut to `rows` and `columns`.

        float32 for F32 and every quantised type, float16 for F16, the bits as uint16 for BF16.
        Only the blocks that the columns touch are read, in runs of rows.
        """
        tensor = self.tensors[name]
        if len(tensor.shape) > 2:
            raise ModelError(f"{self.file}: tensor {name!r} has shape {tensor.shape}, not 1-D, 2-D")
        raw = self._bytes[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.type.name in _PLAIN:
            whole = raw.view(_PLAIN[tensor.type.name]).reshape(tensor.shape)
            return rectangle(whole, rows, columns)
        if len(tensor.shape) == 1:
            if columns is not None:
                raise ValueError("a one-dimensional tensor has no columns")
            span = bounds(rows, tensor.shape[0])
            return _dequantise(raw.reshape(1, -1), tensor.type, span).reshape(-1)
        start, stop = bounds(rows, tensor.shape[0])
        lines = raw.reshape(tensor.shape[0], -1)[start:stop]
        return _dequantise(lines, tensor.type, bounds(columns, tensor.shape[1]))


def _map(path: Path, file: str) -> Array:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{file}: not a regular file")
        if status.st_size < 24:
            raise ModelError(f"{file}: {status.st_size} bytes are too few for a GGUF file")
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from None


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """(number of tensors, number of metadata entries)."""
    magic = bytes(cursor.take(4, "magic"))
    if magic != MAGIC:
        raise cursor.fail(f"starts with {magic!r}, a GGUF file starts with {MAGIC!r}")
    version = cursor.u32("version")
    if version not in VERSIONS:
        swapped = version and version & 0xFFFF == 0
        kind = "big-endian files are not supported; " if swapped else ""
        raise cursor.fail(f"version is {version}; {kind}allowed are {VERSIONS}")
    tensors = cursor.count("number of tensors", MIN_TENSOR_BYTES)
    return tensors, cursor.count("number of metadata entries", MIN_ENTRY_BYTES)


def _read_metadata(cursor: _Cursor, entries: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(entries):
        key = cursor.name(f"key of metadata entry {index}")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} is given twice")
        metadata[key] = cursor.value(cursor.u32(f"type of {key!r}"), repr(key))
    return metadata


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    found = [_read_tensor(cursor, index, alignment) for index in range(count)]
    start = -(-cursor.position // alignment) * alignment
    end = cursor.position + cursor.remaining
    tensors: dict[str, GgufTensor] = {}
    last: GgufTensor | None = None
    for item in sorted(found, key=lambda tensor: tensor.offset):
        tensor = GgufTensor(item.name, item.shape, item.type, start + item.offset, item.nbytes)
        if tensor.name in tensors:
            raise cursor.fail(f"tensor {tensor.name!r} is given twice")
        if tensor.offset + tensor.nbytes > end:
            raise cursor.fail(
                f"tensor {tensor.name!r} of shape {tensor.shape} ends at byte "
                f"{tensor.offset + tensor.nbytes}, the file has {end}"
            )
        if last is not None and last.offset + last.nbytes > tensor.offset:
            raise cursor.fail(f"tensors {last.name!r} and {tensor.name!r} overlap")
        tensors[tensor.name] = last = tensor
    return {item.name: tensors[item.name] for item in found}


def _read_tensor(cursor: _Cursor, index: int, alignment: int) -> GgufTensor:
    """One entry of the tensor table; its offset still counts from the start of the data."""
    name = cursor.name(f"name of tensor {index}")
    rank = cursor.u32(f"number of dimensions of {name!r}")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} has {rank} dimensions, allowed are 1 to 4")
    sizes = [cursor.u64(f"dimension of {name!r}") for _ in range(rank)]
    if 0 in sizes:
        raise cursor.fail(f"tensor {name!r} has sizes {sizes}, each must be at least 1")
    code = cursor.u32(f"type of {name!r}")
    if code not in TENSOR_TYPES:
        allowed = ", ".join(kind.name for kind in TENSOR_TYPES.values())
        raise cursor.fail(f"tensor {name!r} has type {code}, supported are {allowed}")
    kind = TENSOR_TYPES[code]
    if sizes[0] % kind.block:
        raise cursor.fail(
            f"tensor {name!r} has rows of {sizes[0]} elements, {kind.name} packs {kind.block}"
        )
    offset = cursor.u64(f"offset of {name!r}")
    if offset % alignment:
        raise cursor.fail(f"tensor {name!r} has offset {offset}, not a multiple of {alignment}")
    nbytes = math.prod(sizes) // kind.block * kind.size
    return GgufTensor(name, tuple(reversed(sizes)), kind, offset, nbytes)


def _dequantise(lines: Array, kind: TensorType, span: tuple[int, int]) -> Array:
    """Packed rows [R, bytes] -> float32 [R, columns of `span`]."""
    # Imported here: it takes a tenth of a second that plain checkpoints need not spend.
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    first, last = span[0] // kind.block, -(-span[1] // kind.block)
    lines = lines[:, first * kind.size : last * kind.size]
    skip = span[0] - first * kind.block
    out = np.empty((len(lines), span[1] - span[0]), np.float32)
    if out.size == 0:
        return out
    step = max(CHUNK_ELEMENTS // ((last - first) * kind.block), 1)
    with np.errstate(all="ignore"):  # damaged scales give inf or nan, not warnings
        for row in range(0, len(lines), step):
            packed = lines[row : row + step]
            # as one row, of which the library makes no small pieces
            values = dequantize(packed.reshape(1, -1), GGMLQuantizationType[kind.name])
            out[row : row + step] = values.reshape(len(packed), -1)[:, skip : skip + out.shape[1]]
    return out
