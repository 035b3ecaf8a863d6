"""Linear layers with float8 weights (e4m3), a scale for each output, and float8 inputs.

Shapes: x [M, K], weight float8 [N, K], scales float32 [N, 1]. Up to 16 rows the weights are read
by the kernels of `linear`, with inputs as they are; above, inputs are quantised by rows and
multiplied by the library's scaled product, which takes sizes that are multiples of 16. The
quantisation of inputs is part of the norm or the activation before them (`rms_norm_quantize`,
`gated_quantize`), or a kernel of its own here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import quantize_rows
from .conversion import FLOAT8, FLOAT8_MAX
from .linear import SOME, small_product


def pack_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] of any type -> (float8 [N, K], float32 scales [N, 1]); largest = 448 steps."""
    wide = weight.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_(min=1e-12) / FLOAT8_MAX
    return (wide / scale).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


class Float8Linear:
    """A weight of 8 bits: x @ (weight * scale).T + bias."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        programmatic: bool = False,
    ) -> None:
        """`weight` and `scale` as `pack_float8` gives them; ValueError for sizes not in 16s."""
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise ValueError(
                f"float8: a weight of {list(weight.shape)}; both sizes must be multiples of 16"
            )
        self._weight, self._scale, self._bias = weight.contiguous(), scale.contiguous(), bias
        self._programmatic = programmatic

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] of bfloat16 or float16 -> [T, out]."""
        if len(x) <= SOME:
            return small_product(
                x, self._weight, self._bias, self._scale, programmatic=self._programmatic
            )
        return self.quantized(*quantize_rows(x), x.dtype)

    def quantized(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """x float8 [T, in] with scales float32 [T, 1] -> [T, out] in `dtype`."""
        return torch._scaled_mm(
            x,
            self._weight.t(),
            scale_a=scale,
            scale_b=self._scale.t(),
            bias=self._bias,
            out_dtype=dtype,
        )
