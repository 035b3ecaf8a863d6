"""Rounding float32 to narrower types, and what the interpreter needs for it."""

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.kernels.float8 import FLOAT8_MAX, LEAST_PEAK

LARGEST, LEAST = tl.constexpr(FLOAT8_MAX), tl.constexpr(LEAST_PEAK)
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
def stored(x, dtype: tl.constexpr):
    """x as a KV pool of `dtype` holds it: in float8 without a scale, its largest number at most."""
    if dtype == tl.float8e4nv:
        x = x.to(tl.float32)
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))  # NaN stays
    return rounded(x, dtype)


@triton.jit
def float8_scale(peak):
    """The scale of rows whose largest magnitude, infinite where a number is not finite, is `peak`."""
    return tl.where(peak < float("inf"), tl.maximum(peak, LEAST) / LARGEST, float("nan"))


@triton.jit
def float8_size(x):
    """Magnitudes of float32 x for `float8_scale`."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def float8_levels(x, scale):
    """float32 x in units of the scale, rounded."""
    return rounded(tl.clamp(x / scale, -LARGEST, LARGEST), tl.float8e4nv)


@triton.jit
def product(a, b, accumulated):
    """accumulated + a @ b in float32."""
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulated, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulated, input_precision="ieee")
