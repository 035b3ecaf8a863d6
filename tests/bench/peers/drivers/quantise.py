"""A GGUF file in another of llama.cpp's formats: quantise.py FILE FORMAT FILE."""

from __future__ import annotations

import sys
from pathlib import Path

import llama_cpp


def main() -> None:
    """The file is there when it is whole."""
    source, kind, target = sys.argv[1:]
    part = Path(target + ".part")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    if code := llama_cpp.llama_model_quantize(source.encode(), str(part).encode(), params):
        raise SystemExit(f"llama_model_quantize gave {code}")
    part.rename(target)


if __name__ == "__main__":
    main()
