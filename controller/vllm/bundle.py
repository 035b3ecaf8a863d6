"""The tokenizer as files of a Hugging Face folder, for gateways that tokenise themselves."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile

from phalanx.controller.model import ServedModel

CHUNK_BYTES = 64 * 1024
_DATE = (1980, 1, 1, 0, 0, 0)  # the same model gives the same bytes


def tokenizer_bundle(model: ServedModel) -> tuple[bytes, str]:
    """(zip archive, its SHA-256 in hex). Also of a GGUF file, which holds no such files."""
    config = {
        "model_type": model.spec.family,
        "vocab_size": model.spec.vocab_size,
        "max_position_embeddings": model.max_context,
        "eos_token_id": list(model.eos_token_ids),
    }
    named = dict(model.special_tokens)
    settings = {"model_max_length": model.max_context, "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {
        "tokenizer.json": model.tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            {**settings, **named, "chat_template": model.chat_template}
        ),
        "special_tokens_map.json": json.dumps(named),
        "generation_config.json": json.dumps({"eos_token_id": list(model.eos_token_ids)}),
        "config.json": json.dumps(config),
    }
    if model.chat_template is not None:
        files["chat_template.jinja"] = model.chat_template
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, _DATE), text, zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()
