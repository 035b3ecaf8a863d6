"""The compiled backend, opened once for each instruction set that this processor has."""

from __future__ import annotations

import pytest

from phalanx.kernels.cpu.library import library_path
from phalanx.kernels.cpu.native_backend import NativeBackend


def _open() -> dict[str, NativeBackend]:
    backends: dict[str, NativeBackend] = {}
    if library_path() is None:
        return backends  # the package was installed without a compiler
    for isa in ("amx_imitated", "plain", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "amx"):
        try:
            backends[isa] = NativeBackend(threads=2, isa=isa)
        except OSError:
            continue  # this processor has no such instructions
    return backends


_NATIVES = _open()


@pytest.fixture(scope="session")
def natives() -> dict[str, NativeBackend]:
    """By instruction set, the best one last; two threads each."""
    return _NATIVES


@pytest.fixture(scope="session", params=_NATIVES)
def native(request: pytest.FixtureRequest) -> NativeBackend:
    """Each of them in turn."""
    return _NATIVES[request.param]
