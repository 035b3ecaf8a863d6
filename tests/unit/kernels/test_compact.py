"""Weights of bfloat16 in 12 bits: the same numbers, and the same bits of every product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.cpu.library import library_path
from phalanx.kernels.cpu.native_backend import NativeBackend

if library_path() is None:
    pytest.skip("the package was installed without a compiler", allow_module_level=True)


def _weight(out: int, inputs: int, seed: int, strays: float) -> Tensor:
    """Normal numbers, some of them replaced by others of any finite size, zeros among them."""
    make = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, inputs, generator=make) * 0.02).bfloat16()
    bits = torch.randint(0, 0x7F80, weight.shape, generator=make, dtype=torch.int16)
    others = torch.where(bits % 7 == 0, 0, bits).view(torch.bfloat16)
    return torch.where(torch.rand(weight.shape, generator=make) < strays, others, weight)


def _same(left: Tensor, right: Tensor) -> bool:
    kind = torch.int16 if left.dtype is torch.bfloat16 else torch.int32
    return torch.equal(left.view(kind), right.view(kind))


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 140),
    inputs=st.integers(1, 700),
    rows=st.sampled_from([1, 2, 11, 12, 13, 24, 25, 70, 192, 193]),
    seed=st.integers(0, 9),
    strays=st.sampled_from([0.0, 0.0005, 0.003, 0.1, 1.0]),
)
def test_products_and_rows_have_the_bits_of_a_weight_in_sixteen(
    native: NativeBackend, out: int, inputs: int, rows: int, seed: int, strays: float
) -> None:
    weight, bias = _weight(out, inputs, seed, strays), torch.randn(out)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).bfloat16()
    plain = NativeBackend(threads=2, isa=native.isa, compact=False).pack_linear(weight, bias)
    compact = native.pack_linear(weight, bias)
    assert _same(compact(x), plain(x))
    ids = torch.arange(out)
    assert _same(native.pack_linear(weight, None).rows(ids), weight)  # type: ignore[attr-defined]


def test_a_model_of_usual_weights_takes_three_quarters_of_the_memory(
    native: NativeBackend,
) -> None:
    weight = _weight(2048, 512, 1, 0.0)
    sizes = [
        backend.pack_linear(weight, None).bytes  # type: ignore[attr-defined]
        for backend in (native, NativeBackend(threads=2, isa=native.isa, compact=False))
    ]
    assert sizes[1] >= weight.nbytes
    assert 0.75 <= sizes[0] / weight.nbytes < 0.77


@pytest.mark.parametrize("flaw", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_spoils_its_own_output_only(
    native: NativeBackend, flaw: float
) -> None:
    weight = _weight(70, 64, 1, 0.0)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = native.pack_linear(weight, None)(x)
    broken = weight.clone()
    broken[40, 3] = flaw
    got = native.pack_linear(broken, None)(x)
    assert not torch.isfinite(got[:, 40]).any()
    others = [column for column in range(70) if column != 40]
    assert _same(got[:, others].contiguous(), expected[:, others].contiguous())
