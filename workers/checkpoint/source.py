"""One view of a checkpoint, whatever its kind: names, shapes, slices and a description."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Protocol

from phalanx.protos.errors import ModelError

from .description import ModelDescription, describe_gguf
from .gguf import GgufFile
from .safetensors import SafetensorsFile, open_files, read_json
from .slices import TensorSlice

__all__ = [
    "Checkpoint",
    "GgufCheckpoint",
    "Kind",
    "ModelDescription",
    "SafetensorsCheckpoint",
    "TensorSlice",
    "open_checkpoint",
]

Kind = Literal["safetensors", "gguf"]
MAX_CONFIG_BYTES = 1024 * 1024
_ALLOWED = "a folder with config.json and *.safetensors, a .gguf file, or the name smollm2"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_GGUF_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


class Checkpoint(Protocol):
    """An open checkpoint. Tensors are read by slice, straight from the mapped file."""

    @property
    def kind(self) -> Kind:
        """How tensors are named and stored."""

    @property
    def path(self) -> Path:
        """Absolute path of the folder or file."""

    @property
    def description(self) -> ModelDescription:
        """The model's config in Hugging Face's terms."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape. Raises `ModelError` for an unknown name, as do `dtype` and `read`."""

    def dtype(self, name: str) -> str:
        """The dtype that `read` gives: "float32", "float16" or "bfloat16"."""

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        entry: int | None = None,
    ) -> TensorSlice:
        """A rectangle of a two-dimensional tensor, or `rows` of a one-dimensional one.

        With `entry`, of that tensor of a stack.
        """


class SafetensorsCheckpoint:
    """A folder in the layout of Hugging Face."""

    kind: Kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = ModelDescription(
            "config.json", read_json(path / "config.json", MAX_CONFIG_BYTES)
        )
        self._files = open_files(path)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise ModelError(f"{self.path.name}: lacks tensor {name!r}")
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape."""
        return self._file(name).tensors[name].shape

    def dtype(self, name: str) -> str:
        """The dtype that `read` gives."""
        return self._file(name).dtype(name)[0]

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        entry: int | None = None,
    ) -> TensorSlice:
        """A read-only view of the file."""
        file = self._file(name)
        _check_readable(self.path.name, name, self.shape(name), entry)
        return file.read(name, rows, columns, entry)


class GgufCheckpoint:
    """A GGUF file; quantised tensors are read as float32."""

    kind: Kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.description = describe_gguf(self.file)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.file.tensors)

    def _check(self, name: str) -> None:
        if name not in self.file.tensors:
            raise ModelError(f"{self.path.name}: lacks tensor {name!r}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape."""
        self._check(name)
        return self.file.tensors[name].shape

    def dtype(self, name: str) -> str:
        """The dtype that `read` gives."""
        self._check(name)
        return _GGUF_DTYPES.get(self.file.tensors[name].type.name, "float32")

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        entry: int | None = None,
    ) -> TensorSlice:
        """A new float32 array, or a read-only view of the file for F32, F16 and BF16."""
        if entry is not None:
            raise ModelError(f"{self.path.name}: stacks as {name!r} are not read from GGUF files")
        _check_readable(self.path.name, name, self.shape(name), None)
        return TensorSlice(self.file.read(name, rows, columns), self.dtype(name))


def _check_readable(file: str, name: str, shape: tuple[int, ...], entry: int | None) -> None:
    if entry is not None:
        if not 2 <= len(shape) <= 3 or not 0 <= entry < shape[0]:
            raise ModelError(f"{file}: tensor {name!r} has shape {shape}, no stack with a {entry}")
    elif not 1 <= len(shape) <= 2:
        raise ModelError(f"{file}: tensor {name!r} has shape {shape}; 1-D and 2-D are supported")


def open_checkpoint(path: str | os.PathLike[str]) -> SafetensorsCheckpoint | GgufCheckpoint:
    """Open and check a checkpoint; no tensor is read.

    Raises `ModelError` for a missing path, an unsupported kind and any malformed file. Pickled
    checkpoints are refused: to load one is to run its code.
    """
    place = Path(os.path.abspath(path))
    if place.is_dir():
        return _open_folder(place)
    if place.suffix in _PICKLES:
        raise ModelError(f"{place.name}: pickled checkpoints are refused; allowed is {_ALLOWED}")
    if not place.exists():
        raise ModelError(f"{place.name}: no such model; allowed is {_ALLOWED}")
    if place.suffix != ".gguf":
        raise ModelError(f"{place.name}: not a known kind of checkpoint; allowed is {_ALLOWED}")
    return GgufCheckpoint(place)


def _open_folder(folder: Path) -> SafetensorsCheckpoint:
    if any(folder.glob("*.safetensors")) and (folder / "config.json").exists():
        return SafetensorsCheckpoint(folder)
    pickled = any(file.suffix in _PICKLES for file in folder.iterdir())
    why = "holds only pickled weights, which are refused" if pickled else "holds no checkpoint"
    raise ModelError(f"{folder.name}: {why}; allowed is {_ALLOWED}")
