"""A GGUF file as a folder of bfloat16 safetensors: export_folder.py FILE FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    """The folder is there when it is whole."""
    source, target = map(Path, sys.argv[1:])
    part = target.with_name(target.name + ".part")
    options = {"gguf_file": source.name}
    transformers.AutoModelForCausalLM.from_pretrained(
        source.parent,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
        **options,
    ).save_pretrained(part)
    transformers.AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(part)
    part.rename(target)


if __name__ == "__main__":
    main()
