"""Choosing a backend: once, at start, with the reason printed."""

from __future__ import annotations

from .cpu.backend import CpuBackend
from .interface import KernelBackend
from .reference import ReferenceBackend


def select_backend(device: str, override: str | None = None) -> tuple[KernelBackend, str]:
    """The backend for `device` ("cpu" or "cuda") and the reason, as a sentence for the log."""
    backends: dict[str, type[ReferenceBackend]] = {
        CpuBackend.name: CpuBackend,
        ReferenceBackend.name: ReferenceBackend,
    }
    if override is not None:
        if override not in backends:
            raise ValueError(f"kernels: {override!r} is not one of {sorted(backends)}")
        return backends[override](), f"kernels: {override} (asked for)"
    if device == "cpu":
        return CpuBackend(), "kernels: cpu-torch (CPU device)"
    return ReferenceBackend(), f"kernels: reference (no own kernels for {device} yet)"
