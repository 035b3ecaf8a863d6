"""The safetensors reader: slices equal the reference library's, bad files give typed errors."""

from __future__ import annotations

import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from phalanx.protos.errors import ModelError
from phalanx.workers.checkpoint.safetensors import SafetensorsFile
from phalanx.workers.checkpoint.source import open_checkpoint


def build(header: object, data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one(**fields: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | fields}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_slices_equal_the_reference(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": torch.randn(23, 17, generator=torch.Generator().manual_seed(1)),
        "line": torch.arange(19).float(),
    }
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "model.safetensors")
    for _ in range(40):
        top, bottom = sorted(rng.integers(0, 20, 2).tolist())
        left, right = sorted(rng.integers(0, 18, 2).tolist())
        for name, columns in (("matrix", slice(left, right)), ("line", None)):
            part = file.read(name, slice(top, bottom), columns)
            assert part.dtype == dtype
            found = torch.from_numpy(part.array.copy())
            if dtype == "bfloat16":
                assert part.array.dtype == np.uint16
                found = found.view(torch.bfloat16)
            expected = tensors[name][top:bottom]
            assert torch.equal(found, expected if columns is None else expected[:, columns])


BAD = {
    "empty": (b"", "not a safetensors file"),
    "header length": (struct.pack("<Q", 2**63) + bytes(64), "header length is"),
    "header past end": (struct.pack("<Q", 100) + bytes(64), "header length is 100"),
    "not json": (build(b"{nope"), "not valid JSON"),
    "not utf-8": (build(b"\xff\xfe{}"), "not valid JSON"),
    "deep json": (build(b"[" * 100_000), "not valid JSON"),
    "long number": (build(b'{"t":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "list": (build([]), "a JSON object is needed"),
    "same key": (build(b'{"t":1,"t":2}'), "'t' is given twice"),
    "metadata": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry": (build({"t": 3}), "exactly dtype, shape and data_offsets"),
    "extra field": (build(one(more=1)), "exactly dtype"),
    "dtype": (build(one(dtype="C64")), "'C64', allowed are BOOL, U8"),
    "dtype object": (build(one(dtype=["F32"])), "allowed are BOOL"),
    "dtype wide": (build(one(dtype="I64")), "takes 32"),
    "shape text": (build(one(shape="22")), "positive sizes"),
    "shape bool": (build(one(shape=[True, 4])), "positive sizes"),
    "shape negative": (build(one(shape=[-2, -2])), "positive sizes"),
    "shape zero": (build(one(shape=[0, 4], data_offsets=[0, 0]), b""), "positive sizes"),
    "shape float": (build(one(shape=[2.0, 2])), "positive sizes"),
    "shape scalar": (build(one(shape=[])), "takes 4"),
    "shape deep": (build(one(shape=[1, 1, 1, 2, 2])), "at most 4 positive sizes"),
    "shape huge": (build(one(shape=[10**4000] * 4)), "positive sizes"),
    "overflow": (build(one(shape=[2**62, 4])), "takes"),
    "offsets order": (build(one(data_offsets=[16, 0])), "[begin, end]"),
    "offsets three": (build(one(data_offsets=[0, 8, 16])), "[begin, end]"),
    "size": (build(one(shape=[2, 3])), "takes 24"),
    "past end": (build(one(), bytes(15)), "the file has 15"),
    "rest": (build(one(), bytes(17)), "the file has 17"),
    "hole": (build(one(data_offsets=[4, 20]), bytes(20)), "follows a hole"),
    "overlap": (build(one() | {"u": one(data_offsets=[8, 24])["t"]}, bytes(24)), "overlaps"),
}


def test_tensors_that_are_no_weights_may_lie_beside_them(tmp_path: Path) -> None:
    tensors = {
        "mask": torch.ones(1, 1, 3, 3, dtype=torch.bool),
        "scalar": torch.tensor(-1e9),
        "count": torch.tensor([7, 8]),
        "weight": torch.arange(6.0).view(2, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.shape("mask") == (1, 1, 3, 3) and checkpoint.shape("scalar") == ()
    assert checkpoint.read("weight").array.tolist() == [[0, 1, 2], [3, 4, 5]]
    for name, message in (("count", "dtype I64, weights may have F32"), ("scalar", "shape \\(\\)")):
        with pytest.raises(ModelError, match=message):
            checkpoint.read(name)
    with pytest.raises(ModelError, match="dtype BOOL"):
        checkpoint.dtype("mask")


@pytest.mark.parametrize("name", BAD)
def test_refuses_malformed_files(tmp_path: Path, name: str) -> None:
    raw, message = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            SafetensorsFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.safetensors: ")
    assert peak < 16 * 1024 * 1024


def test_mutated_files_open_or_are_refused(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    raw = (tiny_llama() / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = random.Random(3)
    path = tmp_path / "model.safetensors"
    refused = 0
    tracemalloc.start()
    try:
        for case in range(300):
            data = bytearray(raw)
            place = rng.randrange(8 if case % 10 == 0 else header)
            match case % 3:
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    data[place] = rng.choice(b'0123456789[]{},:"-\0\xff')
                case _:
                    del data[place : place + rng.randrange(1, 9)]
            path.write_bytes(data)
            tracemalloc.reset_peak()
            try:
                file = SafetensorsFile(path)
            except ModelError:
                refused += 1
            else:
                for name, tensor in file.tensors.items():
                    if len(tensor.shape) < 3:
                        file.read(name, None, None)
            assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert refused > 150


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards, `a` and `b` in the first, `c` in the second."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    save_file(first, folder / "model-1.safetensors")
    save_file({"c": torch.full((4,), 7.0)}, folder / "model-2.safetensors")
    write_index(folder, {"a": 1, "b": 1, "c": 2})
    return folder


def write_index(folder: Path, places: dict[str, Any]) -> None:
    files = {
        name: f"model-{place}.safetensors" if isinstance(place, int) else place
        for name, place in places.items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_reads_shards(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    assert checkpoint.read("c", slice(1, 3)).array.tolist() == [7.0, 7.0]
    assert checkpoint.shape("a") == (2, 2)


def test_shards_hold_what_one_file_holds(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama(max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(folder)
    expected = load_file(tiny_llama() / "model.safetensors")
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert np.array_equal(checkpoint.read(name).array, tensor.numpy())


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": 1, "b": 1, "c": 1}, "lacks tensor 'c'"),
        ({"a": 1, "b": 2, "c": 2}, "lacks tensor 'b'"),
        ({"a": 1, "c": 2}, "holds tensor 'b'"),
        ({"a": 1, "b": 1, "c": 2, "d": 2}, "lacks tensor 'd'"),
        ({"a": 1, "b": 1, "c": 3}, "model-3.safetensors: cannot be read"),
        ({"a": "../model-1.safetensors"}, "not the name of a file in the folder"),
        ({"a": "/etc/x.safetensors"}, "not the name of a file in the folder"),
        ({"a": "model-1.bin"}, "not in \\*.safetensors"),
        ({"a": None}, "not in \\*.safetensors"),
        ({}, "weight_map must map"),
    ],
)
def test_refuses_a_wrong_index(sharded: Path, places: dict[str, Any], message: str) -> None:
    write_index(sharded, places)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(sharded)


def test_refuses_links_out_of_the_folder(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-2.safetensors"
    os.rename(shard, tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelError, match="leads out of the checkpoint's folder"):
        open_checkpoint(sharded)


def test_follows_the_links_of_a_snapshot_to_its_blobs(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "0123"
    os.rename(sharded, folder)
    os.rename(folder / "model-2.safetensors", tmp_path / "blobs" / "abc")
    (folder / "model-2.safetensors").symlink_to("../../blobs/abc")
    assert open_checkpoint(folder).read("c").array.tolist() == [7.0] * 4
