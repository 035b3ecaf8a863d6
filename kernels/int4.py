"""Four-bit weights: what a group becomes, and how a backend takes part. Plain torch, the specification.

The inputs of an output are divided into groups of 128, the last one filled up with zeros. A group is
kept as steps, whole numbers of [-8, 7], and one scale of the weight's own type:

    scale = -m / 8 * shrink,    step = round(w / scale),    w ~ step * scale, rounded to its type

where m is the number of largest magnitude, with its sign, so that all 16 steps are used, and shrink the
one of `SHRINKS` that leaves the least squared error. Inputs of a product stay as they are (W4A16).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import KernelBackend, PackedLinear

GROUP = 128
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""What is cut off at a group's end makes room for finer steps."""


@runtime_checkable
class Int4Backend(KernelBackend, Protocol):
    """A backend that multiplies with weights of 4 bits."""

    def pack_linear_int4(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """As `pack_linear`, with the weight rounded in groups; any number of inputs."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (steps int8 [N, G * 128], scales [N, G] of weight's type), G = ceil(K / 128)."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % GROUP))
    groups = padded.float().view(outputs, padded.shape[1] // GROUP, GROUP)
    if not groups.numel():
        return padded.to(torch.int8), weight.new_empty(groups.shape[:2])
    place = groups.abs().argmax(-1, keepdim=True)
    peaks = groups.gather(-1, place) / -8
    steps, scales = torch.zeros_like(groups), torch.zeros_like(peaks, dtype=weight.dtype)
    error = torch.full_like(peaks, torch.inf)
    for shrink in SHRINKS:
        scale = (peaks * shrink).to(weight.dtype)
        rounded = (groups / scale.float().masked_fill(scale == 0, 1.0)).round_().clamp_(-8, 7)
        lost = (rounded * scale.float() - groups).square_().sum(-1, keepdim=True)
        better = ~(lost >= error)  # NaN is not hidden
        steps, scales = torch.where(better, rounded, steps), torch.where(better, scale, scales)
        error = torch.where(better, lost, error)
    return steps.to(torch.int8).view(padded.shape), scales.squeeze(-1)


def dequantize(steps: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """The weight [N, inputs] that a product is made with."""
    wide = steps.float() * scales.float().repeat_interleave(GROUP, 1)
    return wide[:, :inputs].to(scales.dtype)
