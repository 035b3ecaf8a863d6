"""Who is measured: the peers, and ourselves in several forms."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import environments
from peers.driver import Driver
from peers.environments import LLAMA, OPENVINO, TRANSFORMERS, VLLM, Environment
from peers.workloads import ALL, CACHED, LONGEST, Workload

LOAD_S = 600.0
KV_TOKENS = 49152  # room for every workload, and for all systems beside each other
STEP_TOKENS = 512


@dataclass(frozen=True)
class Place:
    """What systems are told of where they run."""

    model: str
    gguf: Path
    venvs: Path
    logs: Path
    threads: int


@dataclass(frozen=True)
class System:
    """One line of the report. `prepare` gives the driver's settings, and may take its time."""

    name: str
    script: str
    environment: Environment | None
    """None: our own."""
    prepare: Callable[[Place], dict[str, Any]]
    workloads: tuple[Workload, ...] = ALL
    dtype: str = "bfloat16"

    @property
    def ours(self) -> bool:
        """Whether it is Phalanx."""
        return self.environment is None

    def set_up(self, place: Place) -> tuple[Path, dict[str, Any]]:
        """Its interpreter and settings. Raises `SetUpFailed`."""
        environment = self.environment
        python = Path(sys.executable) if environment is None else environment.python(place.venvs)
        return python, self.prepare(place)

    def start(self, place: Place) -> Driver:
        """Loaded and ready. Raises `SetUpFailed` or `DriverFailed`."""
        python, settings = self.set_up(place)
        log = place.logs / f"{self.name.replace(' ', '-').replace(',', '')}.log"
        return Driver(python, self.script, settings, log, ours=self.ours, load_s=LOAD_S)


def offline(dtype: str, tp: int, extra: dict[str, Any]) -> System:
    """Ourselves without a server. Every rank gets its part of the cores."""
    engine = {"tp": tp, "kv_tokens": KV_TOKENS, "max_running": 64, **_dtypes(dtype), **extra}
    return System(
        our_name(dtype, tp),
        "drive_phalanx.py",
        None,
        lambda place: {"model": place.model, "engine": engine},
        dtype=dtype,
    )


def served(dtype: str, tp: int, extra: dict[str, Any]) -> System:
    """Ourselves as a server with Ray, asked over gRPC."""
    engine = {"tp": tp, "kv_tokens": KV_TOKENS, "max_running": 64, **_dtypes(dtype), **extra}
    flags = [
        word for name, value in engine.items() for word in (f"--{name.replace('_', '-')}", value)
    ]
    return System(
        f"{our_name(dtype, tp)}, gRPC",
        "drive_grpc.py",
        None,
        lambda place: {"model": place.model, "flags": [str(word) for word in flags]},
        dtype=dtype,
    )


def our_name(dtype: str, tp: int) -> str:
    """What we are called in the report."""
    return f"phalanx {dtype}, tp {tp}"


def _dtypes(dtype: str) -> dict[str, str]:
    return {"dtype": dtype} | ({"kv_dtype": dtype} if dtype == "int8" else {})


def _folder(place: Place) -> dict[str, Any]:
    return {
        "folder": str(environments.folder_of(place.gguf, place.venvs)),
        "dtype": "bfloat16",
        "threads": place.threads,
        "cache": str(place.venvs / "cache"),
        "context": LONGEST + 16,
    }


def _file(kind: str | None) -> Callable[[Place], dict[str, Any]]:
    def prepare(place: Place) -> dict[str, Any]:
        file = place.gguf
        if kind is not None:
            file = environments.quantised(place.gguf, kind, place.venvs)
        return {"file": str(file), "threads": place.threads, "step_tokens": STEP_TOKENS}

    return prepare


UNCACHED = tuple(workload for workload in ALL if workload not in CACHED)
PEERS: dict[str, list[System]] = {
    "vllm": [System("vLLM CPU", "drive_vllm.py", VLLM, _folder)],
    "llama.cpp": [
        System("llama.cpp", "drive_llama.py", LLAMA, _file(None), UNCACHED, "as shipped"),
        System("llama.cpp", "drive_llama.py", LLAMA, _file("Q4_0"), UNCACHED, "Q4_0"),
        System("llama.cpp", "drive_llama.py", LLAMA, _file("Q8_0"), UNCACHED, "Q8_0"),
    ],
    "openvino": [
        System("OpenVINO GenAI", "drive_openvino.py", OPENVINO, _file(None), dtype="as shipped"),
        System("OpenVINO GenAI", "drive_openvino.py", OPENVINO, _file("Q8_0"), dtype="Q8_0"),
    ],
    "transformers": [
        System("transformers", "drive_transformers.py", TRANSFORMERS, _folder, UNCACHED)
    ],
}
"""The forms of each; of several, the one that writes a single stream fastest is measured."""
