"""State spaces over many tokens of one sequence, in runs whose temporaries stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from phalanx.kernels.interface import StateInputs

RUN_ELEMENTS = 1 << 17
"""Numbers of a run's largest temporary."""
RUN_TOKENS = 64
"""Tokens of a run where its work grows with their square."""


def scan(inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `KernelBackend.state_scan`."""
    alike, tokens = inputs.a.shape[1] == 1, len(inputs.x)
    run = _products if alike else _recurrence
    length = RUN_TOKENS if alike else max(RUN_ELEMENTS // max(state.numel(), 1), 1)
    outputs = torch.empty_like(inputs.x)
    for start in range(0, tokens, length):
        part = slice(start, min(start + length, tokens))
        outputs[part], state = run(inputs.at(part), state)
    return outputs, state


def step(inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `KernelBackend.state_step`; overwrites `state`."""
    added = (inputs.steps[..., None] * inputs.x)[..., None]
    state.mul_(torch.exp(inputs.steps[..., None] * inputs.a)[:, :, None])
    state.addcmul_(added, _of_heads(inputs.b, inputs.group)[:, :, None])
    if inputs.c.shape[1] == 1:
        return (state.flatten(1, 2) @ inputs.c.mT).view(inputs.x.shape), state
    return (state @ inputs.c[:, inputs.group, :, None]).squeeze(-1), state


def _recurrence(inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """What does not depend on the state is computed for all tokens, then one product a token."""
    b, c = _of_heads(inputs.b, inputs.group)[:, :, None], inputs.c
    decay = torch.exp(inputs.steps[..., None] * inputs.a)[:, :, None]
    states = (inputs.steps[..., None] * inputs.x)[..., None] * b
    for token in range(len(states)):
        state = torch.addcmul(states[token], decay[token], state, out=states[token])
    if c.shape[1] == 1:
        outputs = (states.flatten(1, 2) @ c.mT).view(inputs.x.shape)
    else:
        outputs = (states * c[:, inputs.group, None]).sum(-1)
    return outputs, state.clone()


def _products(inputs: StateInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix products over the run (Dao 2024, section 6): within it, and with what was before.

    With s the sum of steps a up to a token, the token at t sees that at u <= t through
    exp(s_t - s_u) c_t b_u, and the state before the run through exp(s_t) c_t. No exponent is
    above 0.
    """
    x = (inputs.x * inputs.steps[..., None]).transpose(0, 1)  # [H, L, P]
    sums = (inputs.steps * inputs.a[:, 0]).T.cumsum(-1)  # [H, L]
    tokens = x.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    reach = (sums[:, :, None] - sums[:, None, :]).masked_fill_(later, -torch.inf).exp_()
    b, c = inputs.b.transpose(0, 1), inputs.c.transpose(0, 1)  # [G, L, N]
    seen = _of_heads(c @ b.mT, inputs.group, 0)
    b, c = _of_heads(b, inputs.group, 0), _of_heads(c, inputs.group, 0)
    before = sums.exp()[..., None] * (c @ state.mT)
    outputs = torch.baddbmm(before, seen * reach, x)
    left = (sums[:, -1:] - sums).exp()[..., None] * x  # what is left of each at the end
    state = torch.baddbmm(sums[:, -1].exp()[:, None, None] * state, left.mT, b)
    return outputs.transpose(0, 1), state


def _of_heads(part: Tensor, group: Tensor, dim: int = 1) -> Tensor:
    """A group's part for each of its heads; a single group is not copied."""
    if part.shape[dim] == 1:
        sizes = list(part.shape)
        sizes[dim] = len(group)
        return part.expand(sizes)
    return part.index_select(dim, group)
