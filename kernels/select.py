"""Choosing a backend: once, at start, with the reason told."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from .cpu.backend import CpuBackend
from .cpu.native_backend import NativeBackend
from .interface import KernelBackend
from .reference import ReferenceBackend


def _gpu(device: str, *, programmatic: bool = False) -> tuple[KernelBackend, str]:
    """The Triton backend and what it is made of; ImportError without Triton."""
    import triton

    from .gpu.backend import GpuBackend
    from .gpu.flash import FlashAttention

    flash = FlashAttention.find()
    prompts = "own attention" if flash is None else f"prompts by flash-attn {flash.version}"
    backend = GpuBackend(device, flash=flash, programmatic=programmatic)
    return backend, f"Triton {triton.__version__}, {prompts}"


def select_backend(device: str, override: str | None = None) -> tuple[KernelBackend, str]:
    """The backend for `device` ("cpu" or "cuda") and the reason, as a sentence for the log."""
    backends: dict[str, Callable[[], KernelBackend]] = {
        NativeBackend.name: NativeBackend,
        CpuBackend.name: CpuBackend,
        ReferenceBackend.name: ReferenceBackend,
        "gpu": lambda: _gpu(device)[0],
        "gpu-programmatic": lambda: _gpu(device, programmatic=True)[0],
    }
    if override is not None:
        if override not in backends:
            raise ValueError(f"kernels: {override!r} is not one of {sorted(backends)}")
        return backends[override](), f"kernels: {override} (asked for)"
    if device != "cpu":
        if not device.startswith("cuda"):
            return ReferenceBackend(), f"kernels: reference (no own kernels for {device})"
        if find_spec("triton") is None:
            return ReferenceBackend(), "kernels: reference (Triton is not installed)"
        backend, parts = _gpu(device)
        return backend, f"kernels: gpu ({parts})"
    try:
        native = NativeBackend()
    except OSError as error:
        return CpuBackend(), f"kernels: cpu-torch (no compiled kernels: {error})"
    threads = "1 thread" if native.threads == 1 else f"{native.threads} threads"
    return native, f"kernels: cpu-native ({native.isa}, {threads})"
