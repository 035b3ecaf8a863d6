"""A mixture of experts in place of the feed-forward block; every rank holds a part of each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.shards import RankCut, Span
from phalanx.protos.specs import DecoderSpec, ExpertSpec
from phalanx.workers.loading.pieces import Piece
from phalanx.workers.models.layout import NO_LAYOUTS, PLAIN, Layout, Layouts
from phalanx.workers.models.registry import LayerNames
from phalanx.workers.parallel import TensorParallel

from .linear import ColumnParallelLinear, Output, RowParallelLinear

_Stored = tuple[str, str | None, Layout]
"""Weight, bias and their layout."""


class ExpertsMLP:
    """Each token goes through the experts that its router likes best (Shazeer 2017, Jiang 2024).

    The router is whole on every rank, so that all ranks choose alike; the columns of each expert
    are divided as those of a dense block. With `reduce` off, each rank gives its part of the sum.
    """

    def __init__(
        self,
        model: DecoderSpec,
        experts: ExpertSpec,
        part: RankCut,
        names: LayerNames,
        group: TensorParallel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        *,
        layouts: Layouts = NO_LAYOUTS,
        reduce: bool = True,
    ) -> None:
        self._backend, self._activation = backend, model.activation
        self._group, self._reduce = group, reduce
        self._experts = experts
        hidden = model.hidden_size
        every = [Output(names.router, Span(0, experts.num_experts), names.router_bias)]
        self.router = ColumnParallelLinear(hidden, every, dtype, device, exact=True)
        self._pieces: list[Piece] = []
        self._correction: Tensor | None = None
        if experts.corrected:
            # float32 always: these differ by less than a narrow dtype tells apart
            self._correction = torch.empty(experts.num_experts, device=device)
            self._pieces.append(Piece(names.router_correction, self._correction))
        self.gate_up: list[ColumnParallelLinear] = []
        self.down: list[RowParallelLinear] = []

        def add(columns: Span, gate: _Stored, up: _Stored, down: _Stored) -> None:
            both = [Output(name, columns, bias, layout=layout) for name, bias, layout in (gate, up)]
            self.gate_up.append(ColumnParallelLinear(hidden, both, dtype, device))
            weight, bias, layout = down
            self.down.append(
                RowParallelLinear(
                    *(weight, columns, hidden, group, dtype, device, bias),
                    layout=layout,
                    reduce=False,
                )
            )

        for expert in range(experts.num_experts):
            add(part.experts, *_stored(names, layouts, expert))
        self.shared_router: ColumnParallelLinear | None = None
        if experts.shared_size:
            if experts.shared_gated:
                one = [Output(names.shared_router, Span(0, 1))]
                self.shared_router = ColumnParallelLinear(hidden, one, dtype, device, exact=True)
            shared = (names.shared_gate, names.shared_up, names.shared_down)
            add(part.shared, *((name, None, PLAIN) for name in shared))

    @property
    def linears(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """The linear layers: the routers, then both of each expert, the shared one last."""
        routers = [self.router, *([self.shared_router] if self.shared_router else [])]
        pairs = zip(self.gate_up, self.down, strict=True)
        return [*routers, *(linear for pair in pairs for linear in pair)]

    @property
    def pieces(self) -> list[Piece]:
        """What the checkpoint must fill beside the linear layers."""
        return self._pieces

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden], equal on every rank once reduced."""
        weights, chosen = choose(self.router(x).float(), self._experts, self._correction)
        weights = weights.to(x.dtype)
        total = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            output = self._expert(expert, x[rows])
            total.index_add_(0, rows, output * weights[rows, place, None])
        if self._experts.shared_size:
            shared = self._expert(-1, x)
            if self.shared_router is not None:
                shared = shared * self.shared_router(x).sigmoid()
            total += shared
        return self._group.all_reduce(total) if self._reduce else total

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        gate_up = self.gate_up[expert](x)
        if limit := self._experts.limit:
            gate, up = gate_up.chunk(2, dim=-1)
            gate_up = torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit) + 1], dim=-1)
        return self.down[expert](self._backend.gated(gate_up, self._activation))


def _stored(names: LayerNames, layouts: Layouts, expert: int) -> tuple[_Stored, _Stored, _Stored]:
    """Where a checkpoint holds an expert's gate, up and down projections."""

    def stored(role: str, weight: str, bias: str | None) -> _Stored:
        layout = layouts.get(role, PLAIN)
        if layout.entry is not None:
            layout = replace(layout, entry=expert)
        return weight.replace("{expert}", str(expert)), bias, layout

    return (
        stored("expert_gate", names.expert_gate, names.expert_gate_bias),
        stored("expert_up", names.expert_up, names.expert_up_bias),
        stored("expert_down", names.expert_down, names.expert_down_bias),
    )


def choose(
    logits: Tensor, experts: ExpertSpec, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Router logits float32 [T, experts] -> weights and ids of the chosen, [T, per_token] each."""
    scores = logits.softmax(-1) if experts.scoring == "softmax" else logits.sigmoid()
    ranked = scores if correction is None else scores + correction
    if experts.groups > experts.groups_per_token:
        grouped = ranked.view(len(ranked), experts.groups, -1)
        best = grouped.topk(experts.group_best, dim=-1).values.sum(-1)
        kept = best.topk(experts.groups_per_token, dim=-1).indices
        hidden = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        ranked = grouped.masked_fill(hidden[..., None], -torch.inf).flatten(-2)
    chosen = ranked.topk(experts.per_token, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if experts.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    return weights * experts.scale, chosen
