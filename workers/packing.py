"""Who packs the weights of linear layers: the backend as it is, or rounded to fewer bits.

What is rounded is what a rank holds: scales are of this rank's columns of a row-parallel weight, and
of its inputs. So another number of ranks rounds otherwise; at one number, bits are equal.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from phalanx.kernels.float8 import Float8Backend
from phalanx.kernels.int4 import Int4Backend
from phalanx.kernels.int8 import Int8Backend
from phalanx.kernels.interface import KernelBackend, PackedLinear
from phalanx.protos.errors import ConfigError
from phalanx.protos.specs import INT8_MOST_INPUTS


class LinearPacker(Protocol):
    """What a linear layer needs of a backend to be packed."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare y = x @ weight.T + bias; weight [out, in]."""


class Int8Packer:
    """Packs in int8 what may be."""

    def __init__(self, backend: Int8Backend) -> None:
        self._backend = backend

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `LinearPacker`."""
        if weight.shape[1] > INT8_MOST_INPUTS:
            return self._backend.pack_linear(weight, bias)
        return self._backend.pack_linear_int8(weight, bias)


class Float8Packer:
    """Packs in float8."""

    def __init__(self, backend: Float8Backend) -> None:
        self._backend = backend

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `LinearPacker`."""
        return self._backend.pack_linear_fp8(weight, bias)


class Int4Packer:
    """Packs in int4; groups begin at the rank's first input."""

    def __init__(self, backend: Int4Backend) -> None:
        self._backend = backend

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `LinearPacker`."""
        return self._backend.pack_linear_int4(weight, bias)


def packer(dtype: str, backend: KernelBackend) -> LinearPacker:
    """Of linear layers in a model of `dtype`. Raises `ConfigError` for a backend without it."""
    if dtype == "int8" and isinstance(backend, Int8Backend):
        return Int8Packer(backend)
    if dtype == "fp8" and isinstance(backend, Float8Backend):
        return Float8Packer(backend)
    if dtype == "int4" and isinstance(backend, Int4Backend):
        return Int4Packer(backend)
    if dtype in ("int8", "fp8", "int4"):
        raise ConfigError(f"dtype is {dtype!r}, which the kernels {backend.name!r} do not have")
    return backend
