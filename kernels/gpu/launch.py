"""What the kernels' launches share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def row_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, heads, stride of tokens, stride of heads) of [T, n] or [T, H, D], copied if need be.

    Of a matrix each row is a token with one head. More dimensions are flattened into rows.
    """
    if x.dim() == 3 and x.stride(2) == 1:
        return x, x.shape[1], x.stride(0), x.stride(1)
    if x.dim() == 2 and x.stride(1) == 1:
        return x, 1, x.stride(0), 0
    x = x.contiguous()
    heads = x.shape[-2] if x.dim() > 2 else 1
    return x, heads, heads * x.shape[-1], x.shape[-1]


def launch(kernel: Any, *grid: int) -> Any:
    """`kernel` on a grid of programs: a function of its arguments."""
    return kernel[grid]
