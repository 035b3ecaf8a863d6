"""Rounding float32 to narrower types, and what the interpreter needs for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
INTERPRETED = bool(triton.knobs.runtime.interpret)
EMULATED = tl.constexpr(INTERPRETED)
"""Triton's interpreter truncates when it narrows, and multiplies the bit patterns of bfloat16
matrices. There, rounding is done by hand and products take float32 operands; what is compiled
for a device has neither."""


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in `dtype`, to the nearest even."""
    if EMULATED and (dtype == tl.bfloat16 or dtype == tl.float8e4nv):
        dropped: tl.constexpr = 16 if dtype == tl.bfloat16 else 20
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += (1 << dropped - 1) - 1 + ((bits >> dropped) & 1)
        return (bits >> dropped << dropped).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def product(a, b, accumulated):
    """accumulated + a @ b in float32."""
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulated, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulated, input_precision="ieee")
