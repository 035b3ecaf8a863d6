"""Rotary positions: the table of angles, by each scaling rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phalanx.protos.specs import RopeSpec


def inverse_frequencies(spec: RopeSpec, max_context: int | None = None) -> Tensor:
    """Radians per position of each rotated pair, float32 [rotary_dim / 2] (Su 2021, eq. 15).

    `max_context` is the length that is served. LongRoPE and dynamic NTK scaling depend on the
    length; they take this one for all sequences, so that a cached key stays valid.
    """
    exponent = torch.arange(0, spec.rotary_dim, 2, dtype=torch.int64).float() / spec.rotary_dim
    theta = _dynamic_theta(spec, max_context) if spec.scaling == "dynamic" else spec.theta
    frequencies = 1.0 / (theta**exponent)
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling == "llama3":
        return _llama3(frequencies, spec)
    if spec.scaling == "yarn":
        return _yarn(frequencies, spec)
    if spec.scaling == "longrope":
        return frequencies / torch.tensor(_longrope_factors(spec, max_context))
    return frequencies


def _dynamic_theta(spec: RopeSpec, max_context: int | None) -> float:
    """The base of NTK scaling for a length beyond the original one, within which it is kept."""
    if max_context is None or max_context <= spec.original_max_position:
        return spec.theta
    stretch = spec.factor * max_context / spec.original_max_position - (spec.factor - 1)
    return float(spec.theta * stretch ** (spec.rotary_dim / (spec.rotary_dim - 2)))


def _llama3(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between are blended."""
    wavelength = 2 * math.pi / frequencies
    turns = spec.original_max_position / wavelength
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / spec.factor + blend * frequencies


def _yarn(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Pairs that turn often in the original context are kept, slow ones stretched (Peng 2023)."""

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so often over the original context."""
        ratio = spec.original_max_position / (turns * 2 * math.pi)
        return spec.rotary_dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = pair(spec.beta_fast), pair(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001
    stretched = (torch.arange(len(frequencies)).float() - low) / (high - low)
    stretched = stretched.clamp(0, 1)
    return frequencies / spec.factor * stretched + frequencies * (1 - stretched)


def _longrope_factors(spec: RopeSpec, max_context: int | None) -> tuple[float, ...]:
    """The long factors hold where more than the original context is served."""
    beyond = max_context is not None and max_context > spec.original_max_position
    return spec.long_factor if beyond else spec.short_factor


class RotaryTable:
    """cos and sin of every position, computed once in float32."""

    def __init__(
        self, spec: RopeSpec, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        frequencies = inverse_frequencies(spec, max_context)
        angles = torch.outer(torch.arange(max_context).float(), frequencies)
        self._cos = (angles.cos() * spec.attention_factor).to(device, dtype)
        self._sin = (angles.sin() * spec.attention_factor).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [T, rotary_dim / 2] at int64 positions [T]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)
