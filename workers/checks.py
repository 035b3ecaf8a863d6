"""What a plan names is there: asked before anything is computed."""

from __future__ import annotations

from phalanx.protos.errors import GroupLost
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.steps import StepPlan

from .states import check_states


def check_ids(plan: StepPlan, spec: WorkerSpec) -> None:
    """Raise `GroupLost` for blocks, tokens and states that are not there: compiled kernels read
    and write where these point, without looking."""
    check_states(plan.rows, spec.cache.num_states)
    blocks = [block for row in plan.rows for block in row.new_blocks]
    blocks += [block for copy in plan.copies for block in (copy.source, copy.target)]
    tokens = [token for new in plan.new for token in new.token_ids]
    limits = (spec.cache.num_blocks, spec.model.vocab_size)
    for name, ids, limit in zip(("block", "token"), (blocks, tokens), limits, strict=True):
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise GroupLost(f"plan names {name} {wrong}, there are {limit}")
