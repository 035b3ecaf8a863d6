"""Weights that an earlier start has packed, against those that are packed anew."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from phalanx.kernels.cpu.backend import CpuBackend
from phalanx.kernels.cpu.native_backend import NativeBackend
from phalanx.protos.specs import WorkerSpec
from phalanx.workers.engine import Engine
from phalanx.workers.loading.keeper import recipe
from phalanx.workers.loading.kept import KeptWeights, kept_weights
from phalanx.workers.loading.shelf import Shelf
from phalanx.workers.parallel import SingleRank

BIASED = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bfloat16": ({}, {"dtype": "bfloat16"}),
    "bfloat16-tied": ({"tie_word_embeddings": True}, {"dtype": "bfloat16"}),
    "int8": ({}, {"dtype": "int8"}),
    "int8-tied-2": ({"tie_word_embeddings": True, **BIASED}, {"dtype": "int8", "tp_size": 2}),
    "bfloat16-biased-2": (BIASED, {"dtype": "bfloat16", "tp_size": 2}),
    "float32-3": ({}, {"dtype": "float32", "tp_size": 3}),
}
"""By name the shape of a model, and how it is loaded. Its 101 inner features and 515 tokens are never
cut evenly."""
Start = Callable[[WorkerSpec], Any]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.weights"))


@pytest.mark.parametrize(("shape", "fields"), CASES.values(), ids=list(CASES))
def test_a_second_start_reads_what_the_first_has_packed(
    tiny_llama: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    started: Start,
    read_tensors: list[str],
    tmp_path: Path,
    shape: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    checkpoint = tiny_llama(**shape)
    plain = started(worker_spec(checkpoint, **fields)).answers()
    spec = worker_spec(checkpoint, tmp_path / "kept", **fields)
    assert started(spec).answers() == plain
    assert len(files(tmp_path / "kept")) == fields.get("tp_size", 1)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in files(tmp_path / "kept")} == {0o600}
    read_tensors.clear()
    again = started(spec)
    assert read_tensors and all("norm" in name for name in read_tensors)
    assert again.progress[-1][0] == again.progress[-1][1]
    assert again.answers() == plain


def test_of_itself_only_what_takes_long_to_pack_is_kept(
    tiny_llama: Callable[..., Path],
    tiny_gguf: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    started: Start,
    read_tensors: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "phalanx" / "weights"
    started(worker_spec(tiny_llama(), ""))
    assert not files(folder)  # is small
    monkeypatch.setattr("phalanx.workers.loading.kept.LEAST_BYTES", 0)
    for dtype in ("float32", "int8"):
        started(worker_spec(tiny_llama(), "", dtype=dtype))
        assert not files(folder)
    started(worker_spec(tiny_llama(), ""))
    assert len(files(folder)) == 1  # in 12 bits
    # rows of 96: of blocks
    checkpoint = tiny_gguf(quantization="Q8_0", hidden_size=96, intermediate_size=160)
    plain = started(worker_spec(checkpoint, dtype="int8")).answers()
    assert started(worker_spec(checkpoint, "", dtype="int8")).answers() == plain
    assert len(files(folder)) == 2
    read_tensors.clear()
    assert started(worker_spec(checkpoint, "", dtype="int8")).answers() == plain
    assert read_tensors and all("norm" in name for name in read_tensors)
    spec = worker_spec(checkpoint, tmp_path / "other")
    assert kept_weights(spec, 0, CpuBackend()) is None
    assert not (tmp_path / "other").exists()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda path: flip(path, 4096 + 10),
    "the index": lambda path: flip(path, -5),
    "the key": lambda path: flip(path, 9),
    "torn": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros at the end": lambda path: os.truncate(path, path.stat().st_size + 4096),
    "for all to write": lambda path: path.chmod(0o666),
    "a link": lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_file_that_is_not_whole_and_ours_is_made_anew(
    tiny_llama: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    started: Start,
    read_tensors: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
) -> None:
    checkpoint = tiny_llama()
    spec = worker_spec(checkpoint, tmp_path / "kept")
    plain = started(spec).answers()
    (file,) = files(tmp_path / "kept")
    whole = file.read_bytes()
    damage(file)
    read_tensors.clear()
    with caplog.at_level(logging.WARNING):
        assert started(spec).answers() == plain
    assert [str(file) in record.getMessage() for record in caplog.records] == [True]
    assert any("norm" not in name for name in read_tensors)
    assert file.read_bytes() == whole and file.stat().st_mode & 0o777 == 0o600
    assert not file.is_symlink()
    read_tensors.clear()
    started(spec)
    assert all("norm" in name for name in read_tensors)


def test_a_checkpoint_that_changed_is_another_one(
    tiny_llama: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    started: Start,
    read_tensors: list[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama(), folder)
    spec = worker_spec(folder, tmp_path / "kept")
    first = started(spec).answers()
    weights = folder / "model.safetensors"
    before = weights.stat()
    flip(weights, -997)  # of as many bytes as before, and, as far as this can be told, as old
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = started(spec).answers()
    assert second != first and second == started(worker_spec(folder)).answers()
    assert len(files(tmp_path / "kept")) == 2
    # the first one's content at another place is known once it was read
    copy = worker_spec(tiny_llama(), tmp_path / "kept")
    started(copy)
    read_tensors.clear()
    assert started(copy).answers() == first
    assert all("norm" in name for name in read_tensors)
    assert len(files(tmp_path / "kept")) == 2


def test_whatever_decides_the_bits_is_in_the_key(
    tiny_llama: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = worker_spec(tiny_llama())
    kinds: tuple[dict[str, Any], ...] = ({}, {"isa": "plain"}, {"compact": False})
    layout, *others = [NativeBackend(threads=1, **kind).storage.layout for kind in kinds]
    keys = {recipe(spec, rank, layout) for rank in (0, 1)}
    keys |= {recipe(spec, 0, other) for other in others}
    for change in (
        {"dtype": "int8"},
        {"dtype": "float32"},
        {"tp_size": 2},
        {"pp_size": 2},
        {"model": msgspec.structs.replace(spec.model, tie_embeddings=True)},
        {"model": msgspec.structs.replace(spec.model, num_layers=1)},
    ):
        keys.add(recipe(msgspec.structs.replace(spec, **change), 0, layout))
    assert len(keys) == 10
    for change in ({"max_running": 3}, {"epoch": 5}, {"checkpoint": "/elsewhere"}):
        assert recipe(msgspec.structs.replace(spec, **change), 0, layout) in keys
    monkeypatch.setattr("phalanx.workers.loading.keeper._MADE_BY", ("checkpoint",))
    assert recipe(spec, 0, layout) not in keys  # other code


def test_starts_at_once_do_each_other_no_harm(
    tiny_llama: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    started: Start,
    tmp_path: Path,
) -> None:
    spec = worker_spec(tiny_llama(), tmp_path / "kept")
    plain = started(worker_spec(tiny_llama())).answers()
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(started(spec).answers())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [plain] * 4
    assert len(files(tmp_path / "kept")) == 1
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".weights", ".digest"}
    assert started(spec).answers() == plain


def test_a_folder_that_others_can_read_is_not_used(
    tiny_llama: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    started: Start,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tmp_path.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        started(worker_spec(tiny_llama(), tmp_path)).answers()
    assert "has mode 0755" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_rank_that_ends_leaves_nothing_unfinished(
    tiny_llama: Callable[..., Path],
    worker_spec: Callable[..., WorkerSpec],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("phalanx.workers.loading.fingerprint.SETTLED_NS", 0)
    spec = worker_spec(tiny_llama(), tmp_path / "kept")
    backend = NativeBackend(threads=1)
    kept = kept_weights(spec, 0, backend)
    assert isinstance(kept, KeptWeights)
    reached, ended = threading.Event(), threading.Event()
    write = Shelf.write

    def begin(*arguments: Any) -> str | None:
        reached.set()
        assert ended.wait(60)
        return write(*arguments)

    monkeypatch.setattr(Shelf, "write", begin)
    engine = Engine(spec, SingleRank(), backend, weights=kept)
    engine.load()
    assert reached.wait(60)
    threading.Timer(0.1, ended.set).start()
    kept.keeper.close()
    assert kept.keeper.wait(0)
    assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".digest"}
