"""Selective state spaces (Mamba, Gu 2023; Mamba-2, Dao 2024), for this rank's channels or heads."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from phalanx.kernels.interface import KernelBackend, StateInputs
from phalanx.protos.shards import Span, StateCut, convolved_channels, whole_groups
from phalanx.protos.specs import DecoderSpec, StateSpec
from phalanx.workers.batch import Batch
from phalanx.workers.cache import LayerCache, LayerState
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import NO_LAYOUTS, PLAIN, Layouts
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel
from phalanx.workers.states import Carried, StateRows

from .linear import ColumnParallelLinear, Output, RowParallelLinear


class StateSpace:
    """x [T, hidden] -> [T, hidden]; what both kinds have alike.

    Everything between the projections is this rank's own, but for a small sum over the group.
    With `reduce` off, each rank gives its part of the sum over the group.
    """

    def __init__(
        self,
        model: DecoderSpec,
        state: StateSpec,
        part: StateCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layouts: Layouts = NO_LAYOUTS,
        reduce: bool = True,
    ) -> None:
        self._state, self._part, self._group, self._backend = state, part, group, backend
        self.pieces: list[Piece] = []
        """What the checkpoint must fill beside the linear layers."""
        shared = _elements(part.groups, state.state_size)
        split = {"x": part.channels} | ({"b": shared, "c": shared} if state.heads else {})
        self._convolution(split, names, layouts, dtype, device)
        wide = () if state.heads else (state.state_size,)
        self._log_decay = torch.empty(part.units.size, *wide, device=device)
        self._skip = torch.empty(part.units.size, device=device)
        self._step_bias = torch.empty(part.units.size, device=device)
        vectors = (
            (names.state_decay, self._log_decay),
            (names.state_skip, self._skip),
            (names.step_bias, self._step_bias),
        )
        self.pieces += [Piece(name, target, part.units) for name, target in vectors]
        outputs = [("state_gate", part.channels)]
        outputs += [(f"state_{role}", rows) for role, rows in split.items()]
        outputs += [("state_steps", part.units)] if state.heads else []
        self.into = ColumnParallelLinear(
            model.hidden_size,
            [
                Output(getattr(names, role), rows, names.state_bias, layout=layouts[role])
                for role, rows in outputs
            ],
            dtype,
            device,
        )
        self.output = RowParallelLinear(
            names.output,
            part.channels,
            model.hidden_size,
            group,
            dtype,
            device,
            names.output_bias,
            reduce=reduce,
        )
        each = max(state.units // state.groups, 1)
        groups = torch.arange(part.units.start, part.units.stop, device=device) // each
        self._group_of_unit = groups - part.groups.start

    def _convolution(
        self,
        split: dict[str, Span],
        names: LayerNames,
        layouts: Layouts,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        channels = convolved_channels(self._state, self._part)
        self._conv = torch.empty(channels, self._state.conv_width, dtype=dtype, device=device)
        self._conv_bias: Tensor | None = None
        if names.conv_bias is not None:
            self._conv_bias = torch.empty(channels, dtype=dtype, device=device)
        start = 0
        for role, rows in split.items():
            own = slice(start, start + rows.size)
            layout = layouts.get(f"conv_{role}", PLAIN)
            name = getattr(names, f"conv_{role}")
            self.pieces.append(Piece(name, self._conv[own], rows, layout=layout))
            if names.conv_bias is not None and self._conv_bias is not None:
                bias = self._conv_bias[own]
                self.pieces.append(Piece(names.conv_bias, bias, rows, layout=layout))
            start += rows.size

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers, in the order of their use."""
        return [self.into, self.output]

    def __call__(self, x: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Advance the states of the step's rows."""
        if cache.state is None or batch.states is None:
            raise TypeError("no states for a state space")
        return self.output(self._mix(self.into(x), batch.states, cache.state))

    def _mix(self, projected: Tensor, rows: StateRows, pool: LayerState) -> Tensor:
        """What `into` gives -> channels, [T, local inner]."""
        raise NotImplementedError

    @cached_property
    def _decay(self) -> Tensor:
        """a of every unit, [units, state_size] or [units, 1]; takes the place of its logarithm."""
        return self._log_decay.view(len(self._skip), -1).exp_().neg_()

    def _convolved(self, x: Tensor, rows: StateRows, pool: LayerState) -> Tensor:
        """x [T, channels], convolved and activated."""
        width, carried = self._state.conv_width - 1, Carried(rows, pool.window)
        result = torch.empty_like(x)
        for piece in carried.pieces():
            tokens = rows.singles[piece]
            window = torch.cat([carried.load(piece), x[tokens, None]], dim=1)
            convolved = self._backend.causal_conv(window, self._conv, self._conv_bias)
            result[tokens] = convolved[:, 0]
            carried.store(piece, window[:, 1:])
        for run in rows.runs:
            window = torch.cat([carried.begin(run), x[run.start : run.stop]])
            convolved = self._backend.causal_conv(window[None], self._conv, self._conv_bias)
            result[run.start : run.stop] = convolved[0]
            for count, slot in run.saves:
                carried.keep(slot, window[count : count + width])
            carried.keep(run.write, window[-width:])
        carried.finish()
        return result

    def _scanned(self, inputs: StateInputs, rows: StateRows, pool: LayerState) -> Tensor:
        """y and what skips the state, float32 [T, local inner]."""
        carried = Carried(rows, pool.state)
        result = torch.empty_like(inputs.x)
        for piece in carried.pieces():
            tokens = rows.singles[piece]
            result[tokens], states = self._backend.state_step(
                inputs.at(tokens), carried.load(piece)
            )
            carried.store(piece, states)
        for run in rows.runs:
            state, start = carried.begin(run), run.start
            for count, slot in (*run.saves, (run.stop - run.start, run.write)):
                part = slice(start, run.start + count)
                result[part], state = self._backend.state_scan(inputs.at(part), state)
                carried.keep(slot, state)
                start = part.stop
        carried.finish()
        return (result + inputs.x * self._skip[:, None]).flatten(1)

    def _inputs(self, x: Tensor, steps: Tensor, b: Tensor, c: Tensor) -> StateInputs:
        """x [T, local inner]; steps [T, units] before their bias; b, c [T, groups * state_size]."""
        state, tokens = self._state, len(x)
        steps = F.softplus(steps.float() + self._step_bias)
        groups = self._part.groups.size
        return StateInputs(
            x=x.float().view(tokens, -1, state.unit_size),
            steps=steps.clamp(state.min_step, state.max_step),
            a=self._decay,
            b=b.float().view(tokens, groups, state.state_size),
            c=c.float().view(tokens, groups, state.state_size),
            group=self._group_of_unit,
        )


class ChannelStates(StateSpace):
    """Mamba: a channel's steps, b and c come from all channels, through one small sum."""

    def __init__(
        self,
        model: DecoderSpec,
        state: StateSpec,
        part: StateCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layouts: Layouts = NO_LAYOUTS,
        reduce: bool = True,
    ) -> None:
        place = (group, backend, dtype, device)
        super().__init__(model, state, part, names, *place, layouts=layouts, reduce=reduce)
        self._sizes = [state.step_rank, state.state_size, state.state_size]
        self.select = RowParallelLinear(
            names.state_select, part.channels, sum(self._sizes), group, dtype, device
        )
        self.steps = ColumnParallelLinear(
            state.step_rank, [Output(names.step_weight, part.channels)], dtype, device
        )

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers, in the order of their use."""
        return [self.into, self.select, self.steps, self.output]

    def _mix(self, projected: Tensor, rows: StateRows, pool: LayerState) -> Tensor:
        gate, x = projected.chunk(2, dim=-1)
        x = self._convolved(x, rows, pool)
        steps, b, c = map(self._normed, torch.split(self.select(x), self._sizes, dim=-1))
        inputs = self._inputs(x, self.steps(steps), b, c)
        return (self._scanned(inputs, rows, pool) * F.silu(gate)).to(x.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        eps = self._state.inner_eps
        return x if eps is None else F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class HeadStates(StateSpace):
    """Mamba-2: heads with one step and one decay each, normed behind the gate."""

    def __init__(
        self,
        model: DecoderSpec,
        state: StateSpec,
        part: StateCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layouts: Layouts = NO_LAYOUTS,
        reduce: bool = True,
    ) -> None:
        place = (group, backend, dtype, device)
        super().__init__(model, state, part, names, *place, layouts=layouts, reduce=reduce)
        self._eps = model.norm_eps
        self._norm = torch.empty(part.channels.size, dtype=dtype, device=device)
        self.pieces.append(Piece(names.state_norm, self._norm, part.channels))
        self._alone = whole_groups(state, group.size)
        shared = part.groups.size * state.state_size
        self._split = [part.channels.size, shared, shared]

    def _mix(self, projected: Tensor, rows: StateRows, pool: LayerState) -> Tensor:
        inner, units = self._part.channels.size, self._part.units.size
        gate, mixed, steps = torch.split(projected, [inner, sum(self._split), units], dim=-1)
        x, b, c = torch.split(self._convolved(mixed, rows, pool), self._split, dim=-1)
        y = self._scanned(self._inputs(x, steps, b, c), rows, pool)
        return self._normed(y * F.silu(gate.float())).to(x.dtype)

    def _normed(self, y: Tensor) -> Tensor:
        """RMS norm over the channels of each group, which may be on several ranks."""
        state, groups = self._state, self._part.groups
        heads = y.view(len(y), -1, state.unit_size)
        squares = heads.square().sum(-1)  # [T, units]
        sums = y.new_zeros(len(y), state.groups)
        sums.index_add_(1, self._group_of_unit + groups.start, squares)
        if not self._alone:
            sums = self._group.all_reduce(sums)
        scale = torch.rsqrt(sums * (state.groups / state.inner_size) + self._eps)
        normed = heads * scale[:, self._group_of_unit + groups.start, None]
        return self._norm * normed.flatten(1).to(self._norm.dtype)


def _elements(groups: Span, size: int) -> Span:
    return Span(groups.start * size, groups.stop * size)
