"""The GGUF reader: equal to the reference library on good files, typed errors on bad ones."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize

from phalanx.protos.errors import ModelError
from phalanx.workers.checkpoint.gguf import GgufFile

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
KINDS += ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name: str, sizes: list[int], kind: int = 0, offset: int = 0, rank: int = -1) -> bytes:
    head = text(name) + struct.pack("<I", len(sizes) if rank < 0 else rank)
    return head + b"".join(struct.pack("<Q", n) for n in sizes) + struct.pack("<IQ", kind, offset)


def build(
    entries: list[bytes], tensors: list[bytes], data: bytes = bytes(256), version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def write(raw: bytes) -> GgufFile:
        path = tmp_path / "file.gguf"
        path.write_bytes(raw)
        return GgufFile(path)

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_reads_metadata_of_every_type(opened: Callable[[bytes], GgufFile], version: int) -> None:
    entries = [
        entry("u8", 0, struct.pack("<B", 200)),
        entry("i16", 3, struct.pack("<h", -7)),
        entry("f32", 6, struct.pack("<f", 0.5)),
        entry("bool", 7, b"\1"),
        entry("text", 8, text("wörld")),
        entry("u64", 10, struct.pack("<Q", 2**64 - 1)),
        entry("f64", 12, struct.pack("<d", 0.1)),
        entry("texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
        entry("nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    ]
    metadata = opened(build(entries, [], version=version)).metadata
    nested = metadata.pop("nested")
    assert isinstance(nested, list) and nested[0].tolist() == [1, -2, 3]
    assert metadata == {
        "u8": 200,
        "i16": -7,
        "f32": 0.5,
        "bool": True,
        "text": "wörld",
        "u64": 2**64 - 1,
        "f64": 0.1,
        "texts": ["a", ""],
    }


def test_agrees_with_the_reference_reader_on_smollm2(smollm2_gguf: Path) -> None:
    ours, theirs = GgufFile(smollm2_gguf), GGUFReader(smollm2_gguf)
    assert list(ours.tensors) == [item.name for item in theirs.tensors]
    for item in theirs.tensors:
        found = ours.tensors[item.name]
        assert found.shape == tuple(reversed(item.shape.tolist()))
        assert (found.type.name, found.offset, found.nbytes) == (
            item.tensor_type.name,
            item.data_offset,
            item.n_bytes,
        )
    assert (
        ours.metadata["tokenizer.ggml.tokens"] == theirs.fields["tokenizer.ggml.tokens"].contents()
    )
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    item = next(item for item in theirs.tensors if item.name == "blk.3.ffn_down.weight")
    part = ours.read(item.name, slice(7, 90), slice(333, 1000))
    np.testing.assert_array_equal(part, dequantize(item.data, item.tensor_type)[7:90, 333:1000])


@pytest.mark.parametrize("kind", KINDS)
def test_slices_equal_the_whole_dequantised_tensor(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    quant = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[quant]
    rows, columns = 37, 3 * 256 if block == 256 else 5 * 32
    raw = rng.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    if kind == "F32":
        raw = rng.standard_normal((rows, columns), dtype=np.float32).view(np.uint8)
    writer = GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("t", raw, raw_shape=raw.shape, raw_dtype=quant)
    writer.add_tensor("line", raw[0], raw_shape=raw[0].shape, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "one.gguf")
    with np.errstate(all="ignore"):
        whole = dequantize(GGUFReader(tmp_path / "one.gguf").tensors[0].data, quant)

    def values(array: np.ndarray) -> np.ndarray:
        if kind == "BF16":
            assert array.dtype == np.uint16
            return (array.astype(np.uint32) << 16).view(np.float32)
        assert array.dtype == (np.float16 if kind == "F16" else np.float32)
        return array.astype(np.float32)

    assert file.tensors["t"].shape == (rows, columns)
    np.testing.assert_array_equal(values(file.read("t")), whole)
    for _ in range(40):
        top, bottom = sorted(rng.integers(0, rows + 1, 2).tolist())
        left, right = sorted(rng.integers(0, columns + 1, 2).tolist())
        part = file.read("t", slice(top, bottom), slice(left, right))
        np.testing.assert_array_equal(values(part), whole[top:bottom, left:right])
        line = file.read("line", slice(left, right))
        np.testing.assert_array_equal(values(line), whole[0, left:right])


def test_reads_in_chunks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (4096, 512 // 32 * 34), dtype=np.uint8)  # 2 Mi elements
    writer = GGUFWriter(tmp_path / "big.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "big.gguf")
    np.testing.assert_array_equal(
        file.read("t", slice(1, 4095)), dequantize(raw, GGMLQuantizationType.Q8_0)[1:4095]
    )
    file.read("t", slice(0, 1))
    tracemalloc.start()
    file.read("t", None, slice(40, 50))  # one block of sixteen in each row
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1024 * 1024  # the whole tensor takes 8 MiB in float32


@pytest.mark.parametrize("wrong", [slice(0, 5), slice(-1, 2), slice(2, 1), slice(0, 2, 2)])
def test_refuses_slices_outside_the_tensor(
    opened: Callable[[bytes], GgufFile], wrong: slice
) -> None:
    file = opened(build([], [tensor("t", [4, 4])]))
    for spans in ((wrong, None), (None, wrong)):
        with pytest.raises(ValueError, match="is not a run inside"):
            file.read("t", *spans)


HUGE = 2**63
SCALE = entry("general.alignment", 4, struct.pack("<I", 48))
BAD = {
    "empty": (b"", "too few"),
    "magic": (b"GGML" + bytes(64), "starts with b'GGML'"),
    "version 1": (build([], [], version=1), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(32), "big-endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(64), "number of tensors"),
    "entry count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(64), "number of metadata"),
    "key length": (build([struct.pack("<Q", HUGE) + bytes(32)], []), "key of metadata entry 0"),
    "text length": (build([entry("k", 8, struct.pack("<Q", HUGE))], []), "'k' is a text of"),
    "text past end": (build([entry("k", 8, struct.pack("<Q", 9999))], []), "needs 9999 bytes"),
    "not utf-8": (build([entry("k", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []), "UTF-8"),
    "value type": (build([entry("k", 13, b"")], []), "value type 13"),
    "bool": (build([entry("k", 7, b"\2")], []), "a bool is 0 or 1"),
    "array length": (
        build([entry("k", 9, struct.pack("<IQ", 10, HUGE))], []),
        "length of 'k'",
    ),
    "array of texts": (build([entry("k", 9, struct.pack("<IQ", 8, 10**6))], []), "length of 'k'"),
    "array depth": (
        build([entry("k", 9, struct.pack("<IQ", 9, 1) * 3 + struct.pack("<IQ", 0, 0))], []),
        "nests arrays",
    ),
    "same key": (build([entry("k", 7, b"\1")] * 2, []), "'k' is given twice"),
    "empty key": (build([entry("", 7, b"\1")], []), "name of printable"),
    "alignment 48": (build([SCALE], []), "general.alignment is 48"),
    "alignment 0": (
        build([entry("general.alignment", 4, bytes(4))], []),
        "general.alignment is 0",
    ),
    "alignment text": (build([entry("general.alignment", 8, text("32"))], []), "powers of two"),
    "no dims": (build([], [tensor("t", [])]), "0 dimensions"),
    "many dims": (build([], [tensor("t", [1] * 5)]), "5 dimensions"),
    "huge dims": (build([], [tensor("t", [1], rank=2**32 - 1)]), "4294967295 dimensions"),
    "zero dim": (build([], [tensor("t", [4, 0])]), "each must be at least 1"),
    "overflow": (build([], [tensor("t", [2**62, 2**62, 4, 1])]), "the file has"),
    "wraps to 0": (build([], [tensor("t", [2**32, 2**32])]), "the file has"),
    "offset": (build([], [tensor("t", [4], offset=1024)]), "the file has"),
    "offset huge": (build([], [tensor("t", [4], offset=2**64 - 32)]), "the file has"),
    "unaligned": (build([], [tensor("t", [4], offset=8)]), "not a multiple of 32"),
    "unknown type": (build([], [tensor("t", [4], kind=4)]), "has type 4, supported are F32"),
    "partial block": (build([], [tensor("t", [33], kind=8)]), "Q8_0 packs 32"),
    "same tensor": (
        build([], [tensor("t", [4]), tensor("t", [4], offset=32)]),
        "tensor 't' is given twice",
    ),
    "overlap": (build([], [tensor("a", [16]), tensor("b", [4], offset=32)]), "'a' and 'b' overlap"),
    "truncated data": (build([], [tensor("t", [64])], bytes(255)), "ends at byte"),
    "truncated header": (build([], [tensor("tensor", [4])])[:60], "bytes at"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_malformed_files(opened: Callable[[bytes], GgufFile], name: str) -> None:
    raw, message = BAD[name]
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            opened(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(caught.value).startswith("file.gguf: ")
    assert peak < 1024 * 1024


def test_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(ModelError, match=path.name):
            GgufFile(path)


def mutate(raw: bytes, rng: random.Random, header: int) -> bytes:
    """One hostile edit: flipped bits, an extreme number, a cut or a repeated stretch."""
    data = bytearray(raw)
    place = rng.randrange(header)
    match rng.randrange(5):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            data[place] = rng.randrange(256)
        case 2:
            value = rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            data[place : place + 8] = struct.pack("<Q", value)
        case 3:
            del data[rng.randrange(len(data)) :]
        case _:
            data[place:place] = data[place : place + rng.randrange(1, 64)]
    return bytes(data)


def test_mutated_files_open_or_are_refused(tmp_path: Path, tiny_gguf: Callable[..., Path]) -> None:
    raw = tiny_gguf().read_bytes()
    header = min(item.offset for item in GgufFile(tiny_gguf()).tensors.values())
    rng = random.Random(7)
    path = tmp_path / "mutated.gguf"
    refused = 0
    tracemalloc.start()
    try:
        for case in range(300):
            # the first and last stretch of the header hold counts and tensors, the middle texts
            path.write_bytes(mutate(raw, rng, 1024 if case % 2 else header))
            tracemalloc.reset_peak()
            try:
                file = GgufFile(path)
            except ModelError:
                refused += 1
            else:
                for name in file.tensors:
                    if len(file.tensors[name].shape) < 3:
                        file.read(name)
            assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert refused > 100
