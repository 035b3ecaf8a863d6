"""Whether what is known of samples in several places agrees; for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from phalanx.controller.kvcache.blocks import require
from phalanx.controller.kvcache.manager import KVCacheManager

from .plan import InFlight
from .planner import StepPlanner
from .sample import Sample, State


def audit_states(
    samples: Collection[Sample], planner: StepPlanner, in_flight: Collection[InFlight]
) -> None:
    """Raise `IntegrityError` unless each sample is where its state says."""
    by_state = {state: [s for s in samples if s.state is state] for state in State}
    require(not by_state[State.ENDED], "an ended sample is kept")
    running = planner.running.values()
    held = {*by_state[State.RUNNING], *by_state[State.LEAVING]}
    require(held == set(running), "running samples disagree")
    require(set(by_state[State.WAITING]) == set(planner.waiting), "waiting samples disagree")
    loading = [sample for waiters in planner.loading.values() for sample in waiters]
    require(set(by_state[State.LOADING]) == set(loading), "loading samples disagree")
    following = [follower for sample in samples for follower in sample.followers]
    require(set(by_state[State.FOLLOWING]) == set(following), "followers disagree")
    for sample in samples:
        owed = sum(step.samples.get(seq) is sample for step in in_flight for seq in step.sampling)
        require(sample.pending == owed, f"{sample.request.key} has {sample.pending} pending")
        require(sample.num_known < sample.limit, f"{sample.request.key} is past its limit")


def audit_running(planner: StepPlanner, cache: KVCacheManager) -> None:
    """Raise `IntegrityError` unless tables and running samples agree."""
    coming = planner.held | planner.reserved | planner.copied
    tables = planner.running.keys() | coming
    require(cache.sequences == tables, "tables of samples that do not run")
    require(planner.has_places(0), "too many samples run")
    require(planner.arrived <= planner.running.keys(), "a sample that arrived does not run")
    active = frozenset() if cache.loads is None else cache.loads.active
    require(planner.loading.keys() <= active, "a sample waits for a load that has ended")
    for seq, sample in planner.running.items():
        require(sample.seq == seq, f"attempt {seq} is filed wrongly")
        room = len(cache.table(seq)) * cache.block_size
        require(sample.num_computed <= room, f"attempt {seq} computes beyond its blocks")
        require(sample.length <= sample.limit, f"attempt {seq} is planned past its limit")
    tenants = Counter(sample.request.tenant for sample in planner.running.values())
    require(tenants == planner.places.running, "running samples of tenants are miscounted")
