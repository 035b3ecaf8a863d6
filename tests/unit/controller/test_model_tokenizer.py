"""Tokenizers built from a checkpoint equal those of transformers and of the models' authors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from phalanx.controller.tokenizer import SPLITS, from_gguf, from_json
from phalanx.protos.errors import ModelError
from phalanx.workers.checkpoint.gguf import GgufFile

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "line\nbreaks\r\n\r\n and\ttabs   many   spaces",
    "It's 3.14159 or 42,000,000 and 2024-11-21; isn't it? They'LL say so.",
    "def f(x: int) -> str:\n    return f'{x!r:>8}'  # ünïcode\n",
    "Zażółć gęślą jaźń, Łódź; Ça va? naïve café",
    "東京は雨です。你好，世界！안녕하세요",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 end",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|>c",
    "\u0000\u0001 control \u200b zero width e\u0301",
    "x" * 300,
    "مرحبا بالعالم שלום עולם Привет мир",
]


def metadata(pre: str, tokens: list[str], merges: list[str], **more: Any) -> dict[str, object]:
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, **more}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return from_gguf(GgufFile(smollm2_gguf).metadata, "smollm2.gguf").tokenizer


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_equals_transformers(smollm2: Tokenizer, smollm2_reference: Any, text: str) -> None:
    ids = smollm2.encode(text).ids
    assert ids == smollm2_reference(text)["input_ids"]
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_cuts_digits_off_first(smollm2: Tokenizer) -> None:
    """As its authors' tokenizer does: spaces before a digit stay together."""
    assert smollm2.encode("x  12").tokens == ["x", "ĠĠ", "1", "2"]
    assert smollm2.encode("٣4").tokens[-1] == "4"


def test_special_tokens_keep_their_ids_and_are_skipped(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("<|im_start|>user<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert smollm2.decode(ids, skip_special_tokens=True) == "user"
    assert smollm2.get_vocab_size() == 49152


@pytest.mark.parametrize("text", TEXTS)
def test_tiny_gguf_equals_the_folder_it_was_made_from(
    tiny_llama: Callable[..., Path], tiny_gguf: Callable[..., Path], text: str
) -> None:
    ours = from_gguf(GgufFile(tiny_gguf()).metadata, "tiny.gguf").tokenizer
    theirs = Tokenizer.from_file(str(tiny_llama() / "tokenizer.json"))
    assert ours.encode(text).ids == theirs.encode(text).ids


ALPHABET = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "č"]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 1234", ["a", "b", "Ġ1", "2", "3", "4"]),
        ("llama-bpe", "ab 1234", ["a", "b", "Ġ", "123", "4"]),
        ("gpt-2", "THEY'LL", ["T", "H", "E", "Y", "'", "LL"]),
        ("llama-bpe", "THEY'LL", ["T", "H", "E", "Y", "'LL"]),
        ("qwen2", "a!\n\n", ["a", "!ĊĊ"]),
        ("gpt-2", "a!\n\n", ["a", "!", "ĊĊ"]),
        ("llama-bpe", "123", ["123"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("gpt-2", "123", ["1", "2", "3"]),
    ],
)
def test_pre_tokenizers_differ_where_the_models_do(pre: str, text: str, pieces: list[str]) -> None:
    """Merges join only what the split leaves together; llama-bpe takes whole tokens unmerged."""
    extra = ["Ġ1", "LL", "'LL", "ĊĊ", "!ĊĊ", "123"]
    merges = ["Ġ 1", "L L", "' LL", "Ċ Ċ", "! ĊĊ"]
    loaded = from_gguf(metadata(pre, ALPHABET + extra, merges), "x.gguf")
    assert loaded.tokenizer.encode(text).tokens == pieces


def test_qwen2_composes_accents() -> None:
    tokens = [*ALPHABET, "Ã", "©", "Ì", "ģ", "!!"]
    loaded = from_gguf(metadata("qwen2", tokens, ["! !"]), "x.gguf")
    assert loaded.tokenizer.encode("e\u0301").tokens == ["Ã", "©"]


def test_start_and_end_tokens_follow_the_file() -> None:
    tokens = [*ALPHABET, "!!", "<s>", "</s>"]
    types = np.array([1] * (len(tokens) - 2) + [3, 3])
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "token_type": types}

    def encode(pre: str, **flags: bool) -> list[str]:
        loaded = from_gguf(metadata(pre, tokens, ["! !"], **ends, **flags), "x.gguf")
        assert loaded.eos_token_ids == (len(tokens) - 1,)
        assert loaded.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        assert loaded.tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
        return list(loaded.tokenizer.encode("a").tokens)

    assert encode("gpt-2") == ["a"]
    assert encode("llama-bpe") == ["<s>", "a"]
    assert encode("llama-bpe", add_bos_token=False) == ["a"]
    assert encode("gpt-2", add_bos_token=True, add_eos_token=True) == ["<s>", "a", "</s>"]


def test_all_end_tokens_count_once() -> None:
    ends = {"eos_token_id": 3, "eot_token_id": 5, "eom_token_id": 3}
    loaded = from_gguf(metadata("gpt-2", [*ALPHABET, "!!"], ["! !"], **ends), "x.gguf")
    assert loaded.eos_token_ids == (3, 5)


# --- SentencePiece ---------------------------------------------------------------------------

WORDS = ["▁the", "▁then", "▁there", "▁hello", "▁world", "▁word", "▁lower", "▁newest", "▁wide"]


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """A vocabulary whose scores fall with the position, as trained ones have."""
    pieces: dict[str, None] = {}
    for size in range(2, 7):
        for word in WORDS:
            pieces |= dict.fromkeys(word[i : i + size] for i in range(len(word) - size + 1))
    letters = sorted(set("".join(WORDS)) | set("abcdefghijklmnopqrstuvwxyz,.é"))
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    types = [2, 3, 3, *[6] * 256]
    order = np.random.default_rng(5).permutation(len(pieces))
    ranked = [list(pieces)[i] for i in order]
    tokens += [*ranked, *letters, "<tool>"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(ranked) + len(letters))] + [0.0]
    return tokens, scores, [*types, *[1] * (len(ranked) + len(letters)), 4]


SPM_TEXTS = [
    "the hello world",
    "then there was the newest word, lower and wide.",
    "two spaces  inside ",
    "hellohello worldthe",
    "日本 😀 tab\there",
    "café",
    "",
    "<s>the</s> then",
    "a<tool>b",
    "  leading spaces",
]


def write_sentencepiece(path: Path, **flags: bool) -> None:
    from gguf import GGUFWriter

    tokens, scores, types = sentencepiece()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_sentencepiece_equals_transformers(tmp_path: Path, flags: dict[str, bool]) -> None:
    from transformers import AutoTokenizer

    write_sentencepiece(tmp_path / "spm.gguf", **flags)
    ours = from_gguf(GgufFile(tmp_path / "spm.gguf").metadata, "spm.gguf").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="spm.gguf")
    for text in SPM_TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text


def merge_by_score(text: str) -> list[str]:
    """SentencePiece's rule, plainly: merge the neighbours that make the best-scored piece."""
    tokens, scores, types = sentencepiece()
    rank = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind in (1, 4)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        pairs = [(rank[piece], -i) for i, piece in enumerate(joined) if piece in rank]
        if not pairs:
            break
        place = -max(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    pieces: list[str] = []
    for part in parts:
        known = part in rank
        pieces += [part] if known else [f"<0x{byte:02X}>" for byte in part.encode()]
    return pieces


@pytest.mark.parametrize("text", SPM_TEXTS[:7])
def test_sentencepiece_merges_the_best_scored_piece_first(tmp_path: Path, text: str) -> None:
    write_sentencepiece(tmp_path / "spm.gguf")
    ours = from_gguf(GgufFile(tmp_path / "spm.gguf").metadata, "spm.gguf").tokenizer
    encoded = ours.encode(text, add_special_tokens=False)
    assert encoded.tokens == merge_by_score(text)
    assert ours.decode(encoded.ids) == text


def test_sentencepiece_without_prefix_space(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "spm.gguf", add_space_prefix=False)
    ours = from_gguf(GgufFile(tmp_path / "spm.gguf").metadata, "spm.gguf").tokenizer
    encoded = ours.encode("the then", add_special_tokens=False)
    assert not encoded.tokens[0].startswith("▁")
    assert ours.decode(encoded.ids) == "the then"


# --- refusals --------------------------------------------------------------------------------

GOOD = metadata("gpt-2", [*ALPHABET, "!!"], ["! !"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "bert", "'bert' is not supported; gpt2 and llama are"),
        ("model", None, "None is not supported"),
        ("pre", "smolm", "'smolm' is not supported; nearest: smollm"),
        ("pre", 7, "7 is not supported"),
        ("tokens", None, "a list of texts"),
        ("tokens", [], "a list of texts"),
        ("tokens", [*ALPHABET, "!!", "a"], "'a' is listed twice"),
        ("merges", None, "merges: a list of texts"),
        ("merges", ["! ! !"], "'! ! !' is not a pair"),
        ("merges", ["! missing"], "not a usable tokenizer"),
        ("token_type", np.array([1, 2]), "one number for each of"),
        ("token_type", np.full(98, 9), "types are 1 to 6"),
        ("bos_token_id", 98, "bos_token_id is 98, allowed are 0 to 97"),
        ("eot_token_id", 10**6, "eot_token_id is 1000000"),
        ("eos_token_id", "2", "eos_token_id is '2'"),
        ("add_bos_token", 1, "add_bos_token: is 1, true or false"),
    ],
)
def test_refuses_wrong_gguf_vocabularies(field: str, value: object, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        from_gguf(GOOD | {f"tokenizer.ggml.{field}": value}, "x.gguf")
    assert str(caught.value).startswith("x.gguf")


def test_sentencepiece_needs_scores_or_merges() -> None:
    fields = GOOD | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}
    with pytest.raises(ModelError, match="scores: missing"):
        from_gguf(fields, "x.gguf")
    with pytest.raises(ModelError, match="finite numbers"):
        from_gguf(fields | {"tokenizer.ggml.scores": np.full(98, np.nan)}, "x.gguf")


def test_every_split_is_a_usable_regular_expression() -> None:
    for pre in SPLITS:
        fields = GOOD | {"tokenizer.ggml.pre": pre}
        assert from_gguf(fields, "x.gguf").tokenizer.encode("!!").tokens == ["!!"]


@pytest.mark.parametrize("raw", ["", "{}", "[]", '{"model": 3}', '{"model":{"type":"BPE"}}'])
def test_refuses_a_broken_tokenizer_json(raw: str) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a usable tokenizer"):
        from_json(raw, tokenizer_config={}, special_tokens_map={}, configs=[], chat_template=None)
