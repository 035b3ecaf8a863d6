"""Choosing a backend: once, at start, with the reason told."""

from __future__ import annotations

from collections.abc import Callable

from .cpu.backend import CpuBackend
from .cpu.native_backend import NativeBackend
from .interface import KernelBackend
from .reference import ReferenceBackend


def select_backend(device: str, override: str | None = None) -> tuple[KernelBackend, str]:
    """The backend for `device` ("cpu" or "cuda") and the reason, as a sentence for the log."""
    backends: dict[str, Callable[[], KernelBackend]] = {
        NativeBackend.name: NativeBackend,
        CpuBackend.name: CpuBackend,
        ReferenceBackend.name: ReferenceBackend,
    }
    if override is not None:
        if override not in backends:
            raise ValueError(f"kernels: {override!r} is not one of {sorted(backends)}")
        return backends[override](), f"kernels: {override} (asked for)"
    if device != "cpu":
        return ReferenceBackend(), f"kernels: reference (no own kernels for {device} yet)"
    try:
        native = NativeBackend()
    except OSError as error:
        return CpuBackend(), f"kernels: cpu-torch (no compiled kernels: {error})"
    threads = "1 thread" if native.threads == 1 else f"{native.threads} threads"
    return native, f"kernels: cpu-native ({native.isa}, {threads})"
