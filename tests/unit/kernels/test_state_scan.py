"""State spaces token by token, many at a time, and in any pieces, against float64 loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phalanx.kernels.cpu import scan as cpu_scan
from phalanx.kernels.cpu.backend import CpuBackend
from phalanx.kernels.interface import StateInputs
from phalanx.kernels.reference import ReferenceBackend

BACKENDS = {"reference": ReferenceBackend(), "cpu": CpuBackend()}


def make(
    tokens: int, heads: int, size: int, groups: int, numbers: int, alike: bool, seed: int
) -> tuple[StateInputs, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = StateInputs(
        x=normal(tokens, heads, size),
        steps=F.softplus(3 * normal(tokens, heads)),  # some nearly 0, some that forget all
        a=-torch.exp(normal(heads, 1 if alike else numbers)),
        b=normal(tokens, groups, numbers),
        c=normal(tokens, groups, numbers),
        group=torch.arange(heads) * groups // heads,
    )
    return inputs, normal(heads, size, numbers)


def in_float64(inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """One channel and one number at a time."""
    state, outputs = state.double(), torch.zeros(inputs.x.shape, dtype=torch.float64)
    tokens, heads, _ = inputs.x.shape
    for token in range(tokens):
        for head in range(heads):
            group, step = int(inputs.group[head]), inputs.steps[token, head].double()
            b, c = (part[token, group].double() for part in (inputs.b, inputs.c))
            x = inputs.x[token, head].double()
            decay = (step * inputs.a[head].double()).exp()
            state[head] = decay * state[head] + step * torch.outer(x, b)
            outputs[token, head] = state[head] @ c
    return outputs, state


SHAPES: dict[str, Any] = {
    "tokens": st.integers(1, 40),
    "heads": st.integers(1, 5),
    "size": st.sampled_from([1, 3]),
    "numbers": st.integers(1, 6),
    "alike": st.booleans(),
    "seed": st.integers(0, 2**16),
}


def groups_of(heads: int, data: st.DataObject) -> int:
    return data.draw(st.integers(1, heads))


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), run=st.sampled_from([1, 7, 64]), **SHAPES)
def test_scans_equal_float64(name: str, data: st.DataObject, run: int, **shape: Any) -> None:
    """Also where the runs are cut short, at any place."""
    shape["groups"] = groups_of(shape["heads"], data)
    inputs, state = make(**shape)
    expected, last = in_float64(inputs, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_scan, "RUN_ELEMENTS", run * state.numel())
        patch.setattr(cpu_scan, "RUN_TOKENS", run)
        outputs, after = BACKENDS[name].state_scan(inputs, state.clone())
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.double(), last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), **SHAPES)
def test_a_step_is_a_scan_of_one_token_each(name: str, data: st.DataObject, **shape: Any) -> None:
    shape["groups"] = groups_of(shape["heads"], data)
    inputs, _ = make(**shape)
    states = torch.randn(len(inputs.x), *inputs.x.shape[1:], inputs.b.shape[-1])
    outputs, after = BACKENDS[name].state_step(inputs, states.clone())
    for row in range(len(states)):
        expected, last = in_float64(inputs.at(slice(row, row + 1)), states[row])
        torch.testing.assert_close(outputs[row].double(), expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after[row].double(), last, rtol=1e-4, atol=1e-4)


def test_a_long_scan_neither_overflows_nor_forgets() -> None:
    """Thousands of tokens whose decays, multiplied, are far below the least float."""
    inputs, state = make(3000, 4, 2, 2, 3, True, 5)
    expected, last = in_float64(inputs, state)
    outputs, after = CpuBackend().state_scan(inputs, state)
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(after.double(), last, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [2, 4, 5])
def test_convolutions_look_back_only(width: int, bias: bool) -> None:
    window = torch.randn(3, 11 + width - 1, 6)
    weight, offset = torch.randn(6, width), torch.randn(6) if bias else None
    expected = F.silu(F.conv1d(window.mT, weight[:, None], offset, groups=6)).mT
    found = ReferenceBackend().causal_conv(window, weight, offset)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
