"""A weight in the compiled library's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .library import TYPES

if TYPE_CHECKING:
    from .native_backend import NativeBackend


class NativeLinear:
    """A packed weight in the library's memory; keeps its backend alive."""

    def __init__(self, backend: NativeBackend, weight: Tensor, bias: Tensor | None) -> None:
        self._backend, self.dtype = backend, weight.dtype
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
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight as it was packed, [n, in]."""
        output = torch.empty(len(ids), self.in_features, dtype=self.dtype)
        ids = ids.contiguous()
        self._backend.library.phx_unpack_rows(
            self.handle, ids.data_ptr(), len(ids), output.data_ptr()
        )
        return output

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], sums in float32."""
        return self._multiply(x, self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """x [T, in] -> float32 [T, out]."""
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(self.dtype).contiguous()
        output = x.new_empty(len(x), self.out_features, dtype=dtype)
        backend = self._backend
        backend.library.phx_matmul(
            backend.handle, self.handle, x.data_ptr(), len(x), output.data_ptr(), TYPES[dtype]
        )
        return output


class NativeInt8Linear:
    """W8A8: int8 weights with a scale for each output, inputs made int8 row by row as they come.

    The products are summed exactly; what is lost is lost in the two roundings to 8 bits.
    """

    def __init__(self, backend: NativeBackend, weight: Tensor, bias: Tensor | None) -> None:
        self._backend = backend
        self.out_features, self.in_features = weight.shape
        wide = weight.float()
        peaks = wide.abs().amax(-1) if self.in_features else wide.new_zeros(self.out_features)
        scales = peaks.div(127).contiguous()
        safe = scales.masked_fill(scales == 0, 1.0)
        rounded = (wide / safe[:, None]).round().to(torch.int8).contiguous()
        added = None if bias is None else bias.float().contiguous()
        self.handle: int = backend.library.phx_pack_int8(
            backend.handle,
            rounded.data_ptr(),
            scales.data_ptr(),
            self.out_features,
            self.in_features,
            None if added is None else added.data_ptr(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in], float32 or bfloat16 -> [T, out] of its dtype."""
        x = x.contiguous()
        output = x.new_empty(len(x), self.out_features)
        backend, kind = self._backend, TYPES[x.dtype]
        backend.library.phx_matmul_int8(
            backend.handle, self.handle, x.data_ptr(), kind, len(x), output.data_ptr(), kind
        )
        return output
