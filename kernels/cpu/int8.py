"""int8 products by torch: oneDNN's, scaled row by row around them."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from phalanx.kernels.int8 import quantize

_ZERO = 128  # what 0 is in unsigned inputs, which oneDNN has the fastest code for
_PIECE = 1 << 20  # elements of a weight that are rounded at a time


def _pack(levels: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(levels, None)
    return packed


def _multiply(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x uint8 [T, in] - 128 -> float32 [T, out], the exact sums times `scales`."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, _ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@functools.cache
def multiplies_exactly() -> bool:
    """Whether this processor's product of bytes is exact; said in the log where it is not.

    Without VNNI instructions the sum of two products is cut to 16 bits.
    """
    try:
        found = _multiply(
            torch.full((2, 64), 255, dtype=torch.uint8),
            _pack(torch.full((16, 64), 127, dtype=torch.int8)),
            torch.ones(16),
        )
        exact = bool((found == 64 * 127 * 127).all())
    except RuntimeError:
        exact = False
    if not exact:
        log = logging.getLogger(__name__)
        log.warning("no exact int8 products here: int8 layers are multiplied in float32")
    return exact


class Int8Linear:
    """A weight rounded to int8 with a scale for each output; inputs are rounded as they come."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, is_exact: bool) -> None:
        # in pieces: what is wide for a while must not be a whole table
        rows = max(_PIECE // max(weight.shape[1], 1), 1)
        pieces = [quantize(piece) for piece in torch.split(weight, rows)]
        levels, self._scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        self._bias = None if bias is None else bias.float()
        self._is_exact = is_exact and weight.numel() > 0
        self._weight = _pack(levels) if self._is_exact else levels

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out] in the dtype of x."""
        return self.wide(x).to(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """x [T, in] -> float32 [T, out]."""
        levels, scales = quantize(x)
        if self._is_exact and len(x):
            # two's complement and unsigned bytes differ in their highest bit
            unsigned = levels.view(torch.uint8).bitwise_xor_(_ZERO)
            product = _multiply(unsigned, self._weight, self._scales)
        else:
            product = (levels.float() @ self._weight.float().T).mul_(self._scales)
        product.mul_(scales[:, None])
        return product if self._bias is None else product.add_(self._bias)
