"""Rotary positions: the table of angles, by each scaling rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phalanx.protos.specs import RopeSpec


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Radians per position of each rotated pair, float32 [rotary_dim / 2] (Su 2021, eq. 15)."""
    exponent = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    frequencies = 1.0 / (spec.theta**exponent)
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling == "llama3":
        return _llama3(frequencies, spec)
    return frequencies


def _llama3(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    wavelength = 2 * math.pi / frequencies
    turns = spec.original_max_position / wavelength
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / spec.factor + blend * frequencies


class RotaryTable:
    """cos and sin of every position, computed once in float32."""

    def __init__(
        self, spec: RopeSpec, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(max_context).float(), inverse_frequencies(spec))
        self._cos = angles.cos().to(device, dtype)
        self._sin = angles.sin().to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [T, rotary_dim / 2] at int64 positions [T]."""
        return self._cos[positions], self._sin[positions]
