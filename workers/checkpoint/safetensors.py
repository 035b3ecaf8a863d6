"""A strict reader of safetensors checkpoints, in one file or in shards.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phalanx.protos.errors import ModelError

from .slices import Array, TensorSlice, rectangle

MAX_HEADER_BYTES = 32 * 1024 * 1024
MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_DIMENSIONS = 4
DTYPES = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies. `offset` counts from the start of its file; `dtype` as stored."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


def parse_json(raw: bytes, file: str) -> dict[str, object]:
    """A JSON object without repeated keys; `ModelError` names `file` otherwise."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ModelError(f"{file}: key {twice!r} is given twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: not valid JSON") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: a JSON object is needed, not {type(value).__name__}")
    return value


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The JSON object in a file of at most `limit` bytes."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise ModelError(
                f"{path.name}: a regular file of at most {limit} bytes is needed, "
                f"not {status.st_size}"
            )
        return parse_json(path.read_bytes(), path.name)
    except OSError as error:
        raise ModelError(f"{path.name}: cannot be read: {error.strerror}") from None


class SafetensorsFile:
    """One safetensors file: where its tensors lie, and their values by slice."""

    def __init__(self, path: Path) -> None:
        self.file = path.name
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode) or status.st_size < 8:
                raise ModelError(f"{self.file}: not a safetensors file")
            self._bytes: Array = np.asarray(np.memmap(path, np.uint8, "r"))
        except OSError as error:
            raise ModelError(f"{self.file}: cannot be read: {error.strerror}") from None
        size = int(struct.unpack("<Q", self._bytes[:8].tobytes())[0])
        allowed = min(MAX_HEADER_BYTES, len(self._bytes) - 8)
        if size > allowed:
            raise ModelError(f"{self.file}: header length is {size}, allowed are {allowed} bytes")
        header = parse_json(self._bytes[8 : 8 + size].tobytes(), self.file)
        _check_remarks(header.pop("__metadata__", {}), self.file)
        self.tensors = {
            name: _entry(name, entry, 8 + size, self.file) for name, entry in header.items()
        }
        _check_layout(self.tensors, 8 + size, len(self._bytes), self.file)

    def dtype(self, name: str) -> tuple[str, str]:
        """(name, numpy's name) of what `read` gives; masks and counters cannot be read."""
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise ModelError(
                f"{self.file}: tensor {name!r} has dtype {stored}, weights may have "
                f"{', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read(
        self, name: str, rows: slice | None, columns: slice | None, entry: int | None = None
    ) -> TensorSlice:
        """A view of the file; bfloat16 as its bits in uint16."""
        dtype, view = self.dtype(name)
        tensor = self.tensors[name]
        raw = self._bytes[tensor.offset : tensor.offset + tensor.nbytes]
        whole = raw.view(view).reshape(tensor.shape)
        part = rectangle(whole if entry is None else whole[entry], rows, columns)
        return TensorSlice(np.require(part, requirements="A"), dtype)


def _check_remarks(value: object, file: str) -> None:
    texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    if not texts:
        raise ModelError(f"{file}: __metadata__ must map texts to texts")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(name: str, entry: object, start: int, file: str) -> StoredTensor:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelError(f"{where} has dtype {dtype!r:.40}, allowed are {', '.join(ITEM_BYTES)}")
    sizes = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not all(_is_size(size) and size for size in shape):
        raise ModelError(f"{where} has shape {shape!r:.80}, at most 4 positive sizes are needed")
    pair = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))
    if not pair or offsets[0] > offsets[1]:
        raise ModelError(f"{where} has data_offsets {offsets!r:.80}, [begin, end] is needed")
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise ModelError(
            f"{where} has {offsets[1] - offsets[0]} bytes, {dtype} {shape!r:.80} takes {nbytes}"
        )
    if len(shape) == 3 and shape[1] == 1:
        del shape[1]  # a convolution of each channel by itself: [channels, 1, width]
    return StoredTensor(tuple(shape), dtype, start + offsets[0], nbytes)


def _check_layout(tensors: Mapping[str, StoredTensor], start: int, end: int, file: str) -> None:
    """Tensors follow each other without gap or overlap and fill the file."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != position:
            kind = "overlaps the tensor before it" if tensor.offset < position else "follows a hole"
            raise ModelError(
                f"{file}: tensor {name!r} {kind}: it starts at byte {tensor.offset - start}, "
                f"expected {position - start}"
            )
        position += tensor.nbytes
    if position != end:
        raise ModelError(
            f"{file}: the tensors take {position - start} bytes, the file has {end - start}"
        )


def open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Every tensor of a checkpoint folder and the file that holds it."""
    if (folder / SINGLE).exists():
        file = SafetensorsFile(_inside(folder, SINGLE))
        return dict.fromkeys(file.tensors, file)
    if (folder / INDEX).exists():
        return _open_shards(folder)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ModelError(
            f"{folder.name}: {len(found)} safetensors files and no {INDEX}; "
            f"a folder holds {SINGLE}, or shards with their index"
        )
    file = SafetensorsFile(_inside(folder, found[0]))
    return dict.fromkeys(file.tensors, file)


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    where = read_json(_inside(folder, INDEX)).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ModelError(f"{INDEX}: weight_map must map tensors to files")
    for name, shard in where.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise ModelError(f"{INDEX}: tensor {name!r} is in {shard!r:.80}, not in *.safetensors")
    files = {
        shard: SafetensorsFile(_inside(folder, shard)) for shard in sorted(set(where.values()))
    }
    for name, shard in where.items():
        if name not in files[shard].tensors:
            raise ModelError(f"{shard}: lacks tensor {name!r}, which {INDEX} places there")
    for shard, file in files.items():
        for name in file.tensors:
            if where.get(name) != shard:
                raise ModelError(f"{shard}: holds tensor {name!r}, which {INDEX} does not say")
    return {name: files[shard] for name, shard in where.items()}


def _inside(folder: Path, file: str) -> Path:
    """The path of `file`, which must lie in `folder`.

    A link may lead out only to the blob store beside a snapshot folder of the Hugging Face cache
    (`<repository>/snapshots/<revision>` and `<repository>/blobs`).
    """
    if "/" in file or "\\" in file or "\0" in file or file in ("", ".", ".."):
        raise ModelError(f"{folder.name}: {file!r:.80} is not the name of a file in the folder")
    root = folder.resolve()
    parents = [root]
    if root.parent.name == "snapshots":
        parents.append(root.parent.parent / "blobs")
    target = (root / file).resolve()
    if target.parent not in parents:
        raise ModelError(f"{file}: is a link that leads out of the checkpoint's folder")
    return target
