"""Who packs the weights of linear layers: the backend as it is, or in int8."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from phalanx.kernels.int8 import Int8Backend
from phalanx.kernels.interface import KernelBackend, PackedLinear
from phalanx.protos.errors import ConfigError
from phalanx.protos.specs import INT8_MOST_INPUTS


class LinearPacker(Protocol):
    """What a linear layer needs of a backend to be packed."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepare y = x @ weight.T + bias; weight [out, in]."""


class Int8Packer:
    """Packs in int8 what may be.

    The scales of a row-parallel layer are those of this rank's columns, of its weight and of its
    inputs alike. So another number of ranks rounds otherwise; at one number, bits are equal.
    """

    def __init__(self, backend: KernelBackend) -> None:
        """Raises `ConfigError` for a backend without int8 products."""
        if not isinstance(backend, Int8Backend):
            raise ConfigError(f"dtype is 'int8', which the kernels {backend.name!r} do not have")
        self._backend = backend

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `LinearPacker`."""
        if weight.shape[1] > INT8_MOST_INPUTS:
            return self._backend.pack_linear(weight, bias)
        return self._backend.pack_linear_int8(weight, bias)
