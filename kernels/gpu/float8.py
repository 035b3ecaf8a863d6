"""Linear layers with float8 weights and inputs (e4m3): a scale for each output, one for each row.

Shapes: x [M, K], weight float8 [N, K], scales float32 [N, 1]. Inputs come rounded from the norm or
the gate before (`Float8Rows`), else a kernel rounds them here. Up to 16 rows the weights are read
by the kernels of `linear`; above, the library's scaled product takes over, whose sizes are
multiples of 16: what is not is filled up with zeros, once for the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.float8 import Float8Rows, pack

from .activation import quantize_rows
from .linear import SOME, small_product

UNIT = 16


class GpuFloat8Linear:
    """A weight of 8 bits: x @ (weight * scale).T + bias, x rounded to float8."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, programmatic: bool = False) -> None:
        """weight [N, K] and bias [N] of the type of products."""
        self._outputs, self._inputs = weight.shape
        more = (-self._outputs % UNIT, -self._inputs % UNIT)
        levels, scales = pack(weight)
        # zeros of any format are bytes of zero
        self._weight = F.pad(levels.view(torch.uint8), (0, more[1], 0, more[0])).view(levels.dtype)
        self._scale = F.pad(scales, (0, 0, 0, more[0]))
        self._bias = None if bias is None else F.pad(bias, (0, more[0]))
        self._programmatic = programmatic

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        return self.of_rows(quantize_rows(x, ahead=self._programmatic))

    def of_rows(self, rows: Float8Rows) -> Tensor:
        """Rows [T, in] -> [T, out] of their dtype."""
        levels, count = rows.levels, self._outputs
        if not count or not self._inputs:
            return self._nothing(rows)
        if more := self._weight.shape[1] - self._inputs:
            levels = F.pad(levels.view(torch.uint8), (0, more)).view(levels.dtype)
        if len(rows) <= SOME:
            return small_product(
                levels,
                self._weight[:count],
                None if self._bias is None else self._bias[:count],
                self._scale[:count],
                row_scale=rows.scales,
                dtype=rows.dtype,
                programmatic=self._programmatic,
            )
        out = torch._scaled_mm(
            levels,
            self._weight.t(),
            scale_a=rows.scales,
            scale_b=self._scale.t(),
            bias=self._bias,
            out_dtype=rows.dtype,
        )
        return out if len(self._weight) == count else out[:, :count].contiguous()

    def _nothing(self, rows: Float8Rows) -> Tensor:
        shape, device = (len(rows), self._outputs), rows.levels.device
        if self._bias is None or not self._outputs:
            return torch.zeros(shape, dtype=rows.dtype, device=device)
        return self._bias[: self._outputs].expand(shape).contiguous()
