"""A weight in the compiled library's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from .library import COMPACT, INT8, TYPES

if TYPE_CHECKING:
    from .native_backend import NativeBackend


class PackedWeight:
    """A weight in panels, in the library's memory; keeps its backend alive.

    `dtype` is that of the inputs and outputs, and of the weight as it came.
    """

    def __init__(
        self, backend: NativeBackend, weight: Tensor, bias: Tensor | None, packed: int
    ) -> None:
        """packed: the library's type of the weight in panels."""
        self._backend, self.dtype, self.packed = backend, weight.dtype, packed
        self.out_features, self.in_features = weight.shape
        weight = weight.contiguous()
        wide = None if bias is None else bias.float().contiguous()
        self.handle: int = backend.library.phx_pack(
            backend.handle,
            weight.data_ptr(),
            TYPES[weight.dtype],
            self.out_features,
            self.in_features,
            None if wide is None else wide.data_ptr(),
            packed,
        )

    @property
    def bytes(self) -> int:
        """What the weight takes in panels."""
        return int(self._backend.library.phx_packed_bytes(self.handle))

    @classmethod
    def restored(
        cls,
        backend: NativeBackend,
        dtype: torch.dtype,
        shape: tuple[int, int],
        packed: int,
        handle: int,
    ) -> Self:
        """One that is in the library's memory already."""
        weight = cls.__new__(cls)
        weight._backend, weight.dtype, weight.packed = backend, dtype, packed
        weight.out_features, weight.in_features = shape
        weight.handle = handle
        return weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], sums in float32 or exact."""
        return self._multiply(x, self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """x [T, in] -> float32 [T, out]."""
        return self._multiply(x, torch.float32)

    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `BestOutput`."""
        x = x.to(self.dtype).contiguous()
        ids, values = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
        self._backend.library.phx_best(
            self._backend.handle,
            self.handle,
            x.data_ptr(),
            TYPES[x.dtype],
            len(x),
            values.data_ptr(),
            ids.data_ptr(),
        )
        return ids, values

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(self.dtype).contiguous()
        output = x.new_empty(len(x), self.out_features, dtype=dtype)
        self._backend.library.phx_matmul(
            self._backend.handle,
            self.handle,
            x.data_ptr(),
            TYPES[x.dtype],
            len(x),
            output.data_ptr(),
            TYPES[dtype],
        )
        return output


class NativeLinear(PackedWeight):
    """A weight in its own dtype; of bfloat16, in 12 bits that say the same (native/compact.h)."""

    def __init__(self, backend: NativeBackend, weight: Tensor, bias: Tensor | None) -> None:
        compact = weight.dtype is torch.bfloat16 and backend.compact
        super().__init__(backend, weight, bias, COMPACT if compact else TYPES[weight.dtype])

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight as it was packed, [n, in]."""
        output = torch.empty(len(ids), self.in_features, dtype=self.dtype)
        ids = ids.contiguous()
        self._backend.library.phx_unpack_rows(
            self.handle, ids.data_ptr(), len(ids), output.data_ptr()
        )
        return output


class NativeInt8Linear(PackedWeight):
    """A weight rounded to int8 with a scale for each output; inputs are rounded as they come."""

    def __init__(self, backend: NativeBackend, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(backend, weight, bias, INT8)
