"""Building the tokenizer that a checkpoint describes, from its values alone.

Two sources: the JSON files of a Hugging Face folder, and the metadata of a GGUF file.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from phalanx.protos.errors import ModelError

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_PIECE_CHARS = 256
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_NAMED = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer and what belongs to it. `special_tokens` maps roles ("bos_token") to texts."""

    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Split:
    """How a byte-level vocabulary cuts text before merging."""

    regex: str
    digits: bool = False
    """Each digit is cut off first."""
    compose: bool = False
    """Text is normalised to NFC."""
    whole_first: bool = False
    """A piece that is a token is taken without looking at the merges."""
    add_bos: bool = False
    """What holds where the file does not say."""


_LLAMA3 = _Split(regex=_LLAMA3_SPLIT, whole_first=True, add_bos=True)
_QWEN2 = _Split(regex=_QWEN2_SPLIT, compose=True)
SPLITS = {
    "default": _Split(regex=_GPT2_SPLIT),
    "gpt-2": _Split(regex=_GPT2_SPLIT),
    "smollm": _Split(regex=_GPT2_SPLIT, digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
VOCABULARIES = ("gpt2", "llama")


@contextlib.contextmanager
def _building(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  the native library raises bare exceptions
        raise ModelError(f"{what}: not a usable tokenizer: {error!s:.200}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by the native library
            raise
        raise ModelError(f"{what}: not a usable tokenizer") from None


def _check_template(template: object, where: str) -> str | None:
    if template is None:
        return None
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS:
        raise ModelError(f"{where}: a text of at most {MAX_TEMPLATE_CHARS} characters is needed")
    return template


# --- Hugging Face folder ---------------------------------------------------------------------


def from_json(
    tokenizer_json: str,
    *,
    tokenizer_config: Mapping[str, object],
    special_tokens_map: Mapping[str, object],
    configs: Sequence[Mapping[str, object]],
    chat_template: str | None,
    vocab_size: int | None = None,
) -> LoadedTokenizer:
    """The tokenizer of a Hugging Face folder.

    `configs` are generation_config.json and config.json, for their `eos_token_id`;
    `chat_template` is the text of chat_template.jinja, which wins over tokenizer_config.json.
    Added tokens from `vocab_size` on, of which the model knows nothing (Gemma 3's text models come
    with the one that stands for an image), are left out: their text is read as any other.
    """
    with _building("tokenizer.json"):
        tokenizer = Tokenizer.from_str(tokenizer_json)
        if vocab_size is not None and tokenizer.get_vocab_size() > vocab_size:
            tokenizer = Tokenizer.from_str(_without_added(tokenizer_json, vocab_size))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    special = _named_tokens(special_tokens_map) | _named_tokens(tokenizer_config)
    ends = [token for config in configs for token in _token_ids(config.get("eos_token_id"))]
    if "eos_token" in special and (end := tokenizer.token_to_id(special["eos_token"])) is not None:
        ends.append(end)
    if chat_template is None:
        chat_template = _default_template(tokenizer_config.get("chat_template"))
    return LoadedTokenizer(
        tokenizer=tokenizer,
        chat_template=_check_template(chat_template, "chat template"),
        special_tokens=special,
        eos_token_ids=tuple(dict.fromkeys(ends)),
    )


def _without_added(tokenizer_json: str, vocab_size: int) -> str:
    """The text of a tokenizer.json less the added tokens from `vocab_size` on."""
    content = json.loads(tokenizer_json)
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] < vocab_size
    ]
    return json.dumps(content)


def _named_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """`*_token` fields, given as texts or as objects with `content`."""
    found: dict[str, str] = {}
    for field, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if field.endswith("_token") and isinstance(value, str):
            found[field] = value
    return found


def _token_ids(value: object) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ModelError(f"eos_token_id is {value!r:.80}, a token id or a list is needed")
    return list(ids)


def _default_template(value: object) -> str | None:
    """A template, or the one called "default" in a list of named ones."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        return _check_template(named.get("default"), "tokenizer_config.json: chat_template")
    return _check_template(value, "tokenizer_config.json: chat_template")


# --- GGUF metadata ---------------------------------------------------------------------------


def from_gguf(metadata: Mapping[str, object], file: str) -> LoadedTokenizer:
    """The tokenizer that GGUF metadata describes; `file` is named in errors.

    Byte-level BPE ("gpt2") cuts text as the model's own tokenizer does, by `tokenizer.ggml.pre`;
    SentencePiece BPE ("llama") ranks merges by the score of the piece that they make, and puts the
    prefix space before a text that does not start with one, as transformers does.
    """
    vocabulary = _Vocabulary(metadata, file)
    with _building(file):
        tokenizer = vocabulary.build()
        vocabulary.add_special(tokenizer)
    special = {role: vocabulary.tokens[token] for role, token in vocabulary.named.items()}
    ends = [vocabulary.token_id(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    template = metadata.get("tokenizer.chat_template")
    return LoadedTokenizer(
        tokenizer=tokenizer,
        chat_template=_check_template(template, f"{file}: tokenizer.chat_template"),
        special_tokens=special,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


class _Vocabulary:
    """The checked fields of `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, object], file: str) -> None:
        self._metadata, self._file = metadata, file
        self.tokens = self._texts("tokens")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise self._wrong("tokens", f"{twice!r:.80} is listed twice")
        self.types = self._numbers("token_type", _NORMAL)
        if self.types.min() < 1 or self.types.max() > 6:
            raise self._wrong("token_type", "types are 1 to 6")
        ids = {role: self.token_id(key) for role, key in _NAMED.items()}
        self.named = {role: token for role, token in ids.items() if token is not None}

    def _wrong(self, field: str, what: str) -> ModelError:
        return ModelError(f"{self._file}: tokenizer.ggml.{field}: {what}")

    def _get(self, field: str) -> object:
        return self._metadata.get(f"tokenizer.ggml.{field}")

    def _texts(self, field: str) -> list[str]:
        values = self._get(field)
        if not isinstance(values, list) or not values or not isinstance(values[0], str):
            raise self._wrong(field, "a list of texts is needed")
        return values

    def _numbers(
        self, field: str, default: int
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        values = self._get(field)
        if values is None:
            return np.full(len(self.tokens), float(default))
        if not isinstance(values, np.ndarray) or values.shape != (len(self.tokens),):
            raise self._wrong(field, f"one number for each of {len(self.tokens)} tokens is needed")
        numbers = values.astype(np.float64)
        if not np.isfinite(numbers).all():
            raise self._wrong(field, "finite numbers are needed")
        return numbers

    def _flag(self, field: str, default: bool) -> bool:
        value = self._get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(field, f"is {value!r:.80}, true or false is needed")
        return value

    def token_id(self, key: str) -> int | None:
        """A checked token id, None when the file has none."""
        value = self._metadata.get(key)
        if value is None:
            return None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, int) or not whole or not 0 <= value < len(self.tokens):
            raise ModelError(
                f"{self._file}: {key} is {value!r:.80}, allowed are 0 to {len(self.tokens) - 1}"
            )
        return value

    def build(self) -> Tokenizer:
        """The tokenizer without its special tokens."""
        kind = self._get("model")
        if kind not in VOCABULARIES:
            raise self._wrong(
                "model", f"{kind!r:.80} is not supported; {' and '.join(VOCABULARIES)} are"
            )
        return self._byte_level() if kind == "gpt2" else self._sentencepiece()

    def _split(self) -> _Split:
        name = self._get("pre") or "default"
        if name not in SPLITS:
            near = difflib.get_close_matches(str(name), SPLITS, 3, 0.0)
            raise self._wrong("pre", f"{name!r:.80} is not supported; nearest: {', '.join(near)}")
        return SPLITS[str(name)]

    def _merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) for merge in self._texts("merges")]
        if wrong := next((pair for pair in pairs if len(pair) != 2), None):
            raise self._wrong("merges", f"{' '.join(wrong)!r:.80} is not a pair of tokens")
        return [(left, right) for left, right in pairs]

    def _byte_level(self) -> Tokenizer:
        split = self._split()
        tokenizer = Tokenizer(
            models.BPE(vocab=self.ids, merges=self._merges(), ignore_merges=split.whole_first)
        )
        digits = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *digits,
                pre_tokenizers.Split(Regex(split.regex), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if split.compose:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        self._frame(tokenizer, split.add_bos)
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        merges = self._merges() if self._get("merges") is not None else self._ranked_merges()
        unknown = self.named.get("unk_token")
        if unknown is None and (self.types == _UNKNOWN).any():
            unknown = int((self.types == _UNKNOWN).argmax())
        tokenizer = Tokenizer(
            models.BPE(
                vocab=self.ids,
                merges=merges,
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        prefix = self._flag("add_space_prefix", True)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            "\u2581", prepend_scheme="first" if prefix else "never", split=False
        )
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(
            [*steps, decoders.Strip(" ", 1, 0)] if prefix else steps
        )
        self._frame(tokenizer, add_bos=True)
        return tokenizer

    def _ranked_merges(self) -> list[tuple[str, str]]:
        """Every split of every piece into two pieces; the best-scored piece is merged first."""
        if self._get("scores") is None:
            raise self._wrong("scores", "missing, and there are no merges either")
        scores = self._numbers("scores", 0)
        ranked: list[tuple[float, int, int, str, str]] = []
        for index, piece in enumerate(self.tokens):
            if self.types[index] not in (_NORMAL, _USER_DEFINED):
                continue
            if len(piece) > MAX_PIECE_CHARS:
                raise self._wrong("tokens", f"token {index} has over {MAX_PIECE_CHARS} characters")
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in self.ids and right in self.ids:
                    ranked.append((-scores[index], -cut, cut - len(piece), left, right))
        ranked.sort(key=lambda item: item[:3])
        return [(left, right) for *_, left, right in ranked]

    def _frame(self, tokenizer: Tokenizer, add_bos: bool) -> None:
        """Start and end tokens around a prompt, where the file asks for them."""
        before, after = [], []
        if self._flag("add_bos_token", add_bos) and "bos_token" in self.named:
            before.append("bos_token")
        if self._flag("add_eos_token", False) and "eos_token" in self.named:
            after.append("eos_token")
        if before or after:
            ids = [(self.tokens[self.named[role]], self.named[role]) for role in before + after]
            single = [self.tokens[self.named[role]] for role in before] + ["$A"]
            single += [self.tokens[self.named[role]] for role in after]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=single, pair=None, special_tokens=ids
            )

    def add_special(self, tokenizer: Tokenizer) -> None:
        """Control tokens are special; they and user-defined ones are matched before all else."""
        special: set[int] = set(np.flatnonzero(np.isin(self.types, (_UNKNOWN, _CONTROL))).tolist())
        special |= set(self.named.values())
        plain: set[int] = set(np.flatnonzero(self.types == _USER_DEFINED).tolist()) - special
        added = [AddedToken(self.tokens[i], normalized=False) for i in sorted(special)]
        tokenizer.add_special_tokens(added)
        added = [AddedToken(self.tokens[i], normalized=False) for i in sorted(plain)]
        tokenizer.add_tokens(added)
