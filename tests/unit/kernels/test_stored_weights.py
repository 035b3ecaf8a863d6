"""Packed weights in files, against the weights that were packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.kernels.stored import StoredArray, StoredLinear


def store(native: NativeBackend, packed: Any, path: Path) -> StoredLinear:
    contents = native.storage.contents(packed)
    assert contents is not None
    arrays = []
    with path.open("wb") as file:
        for view in contents.arrays:
            arrays.append(StoredArray(file.tell(), len(view), native.storage.digest(view)))
            file.write(view)
    return StoredLinear(contents.kind, contents.shape, tuple(arrays))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_weight_comes_back_as_it_was(native: NativeBackend, kind: str, tmp_path: Path) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    pack: Any = native.pack_linear_int8 if kind == "int8" else native.pack_linear
    generator = torch.Generator().manual_seed(1)
    for out, width in ((2100, 777), (33, 1), (0, 5)):  # of two pieces, of one, of none
        weight = torch.randn(out, width, generator=generator).to(dtype)
        packed = pack(weight, torch.randn(out, generator=generator).to(dtype))
        x = torch.randn(5, width, generator=generator).to(dtype)
        stored = store(native, packed, tmp_path / "weight")
        other = NativeBackend(threads=3, isa=native.isa)
        with (tmp_path / "weight").open("rb") as file:
            restored = other.storage.restore(file.fileno(), [stored, stored])
        assert restored is not None
        for linear in restored:
            assert type(linear) is type(packed)
            assert torch.equal(linear(x), packed(x))


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    native, path = NativeBackend(threads=2), tmp_path / "weight"
    weight = torch.randn(300, 1801)  # of more than one piece, whose last word is not whole
    stored = store(native, native.pack_linear(weight, None), path)
    data = path.read_bytes()
    size = stored.arrays[0].size
    for place in (0, 63, 2**20 - 1, 2**20, size - 1, len(data) - 1):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[place] ^= bit
            path.write_bytes(changed)
            with path.open("rb") as file:
                assert native.storage.restore(file.fileno(), [stored]) is None
    swapped = data[8:16] + data[:8] + data[16:]
    for wrong in (data[:-1], b"", swapped):
        path.write_bytes(wrong)
        with path.open("rb") as file:
            assert native.storage.restore(file.fileno(), [stored]) is None
    path.write_bytes(data)
    with path.open("rb") as file:
        assert native.storage.restore(file.fileno(), [stored]) is not None
        larger = stored._replace(shape=(400, 1801))
        assert native.storage.restore(file.fileno(), [stored, larger]) is None


def test_a_table_is_read_into_its_place(tmp_path: Path) -> None:
    native, table = NativeBackend(threads=2), torch.randn(700, 513)
    data = table.view(-1).view(torch.uint8).numpy().data
    (tmp_path / "table").write_bytes(b"head" + bytes(data))
    array = StoredArray(4, len(data), native.storage.digest(data))
    place = torch.zeros(700, 513)
    with (tmp_path / "table").open("rb") as file:
        assert not native.storage.read(file.fileno(), array, torch.zeros(3))
        assert not native.storage.read(file.fileno(), array._replace(offset=3), place)
        assert native.storage.read(file.fileno(), array, place)
    assert torch.equal(place, table)
