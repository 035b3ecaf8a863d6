"""Continuous batching: which samples compute which tokens in each step.

The step loop calls `schedule` for the next plan, sends it, and hands the result to `update`,
which answers with the events of the streams. A sample's life::

               LOADING  blocks of lower tiers come back
                |    ^
                v    |
    add ---> WAITING -----------------> RUNNING --> ENDED  (stop, length, abort, deadline, error)
       |        ^   blocks were found    |  |
       |        +---- preempted ---------+  |
       |        |                           |
       +--> FOLLOWING <---------------------+
            the leader has computed the prompt: fork its blocks

Up to `max_in_flight` plans may be out. A plan that follows an unanswered one counts on a token
that is not known here yet (`Sample.pending`); the ranks know it, since they sampled it. When the
token turns out to be the last one, the row that counted on it was computed in vain, and its
result is dropped. A preempted sample still gets its pending tokens: generation is a pure function
of what came before, so they are the tokens that a second computation would give.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from phalanx.controller.kvcache.blocks import require
from phalanx.controller.kvcache.changes import PrefixUpdate
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.protos.errors import AlreadyExists, GroupLost, ResourceExhausted
from phalanx.protos.moves import MoveReport
from phalanx.protos.steps import StepPlan, StepResult

from .arrivals import Arrivals
from .audit import audit_running, audit_states
from .checks import check_group, error_of
from .config import SchedulerConfig
from .departures import Departures
from .outline import Standing
from .plan import InFlight
from .planner import StepPlanner
from .probation import Computing, Probation
from .queue import DeadlineHeap
from .request import FinishReason, Request, TokenEvent
from .sample import Sample, State
from .stats import SchedulerStats

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStats"]

MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 60.0


class Scheduler:
    """The requests of one replica. Not thread-safe; looks at no clock: time is handed in.

    `cache` belongs to this scheduler alone. epoch: names the group of ranks; steps count from 0.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager, epoch: int = 0) -> None:
        self._config, self._cache, self._epoch = config, cache, epoch
        self._planner = StepPlanner(config, cache)
        self._requests: dict[str, dict[int, Sample]] = {}
        self._num_samples = 0
        self._of_tenant: Counter[str] = Counter()
        """Samples that live."""
        self._deadlines = DeadlineHeap()
        self._probation = Probation()
        self._in_flight: deque[InFlight] = deque()
        self.departures = Departures(cache, self._planner, self._requests)
        self.arrivals = Arrivals(cache, self._planner, self.max_context)
        self._next_order = 0
        self._next_step = 0
        self.foreign_results = 0
        """Results of another epoch, which were ignored."""

    @property
    def max_context(self) -> int:
        """Tokens that one sample may have: the context, or what the whole pool holds and one."""
        pool = self._cache.num_blocks * self._cache.block_size
        return min(self._config.max_context, pool + 1)

    @property
    def has_work(self) -> bool:
        """Whether any sample lives, or blocks are to be moved."""
        loads = self._cache.loads
        return self._num_samples > 0 or (loads is not None and loads.tiers.has_orders)

    @property
    def awaits_moves(self) -> bool:
        """Whether ranks owe answers to `moved`."""
        return self._cache.loads is not None and self._cache.loads.tiers.is_waiting

    @property
    def num_running(self) -> int:
        """Samples that hold blocks."""
        return len(self._planner.running)

    @property
    def num_waiting(self) -> int:
        """Samples that live and hold no blocks."""
        return self._num_samples - self.num_running

    @property
    def in_flight(self) -> int:
        """Plans made and not yet answered."""
        return len(self._in_flight)

    @property
    def computing(self) -> Computing:
        """Whose tokens the unanswered plans compute."""
        names = {
            item.request.request_id for plan in self._in_flight for item in plan.samples.values()
        }
        return Computing(frozenset(names), any(plan.alone for plan in self._in_flight))

    @property
    def planned(self) -> Iterable[Sample]:
        """Who computes in the plan made last."""
        return self._in_flight[-1].samples.values() if self._in_flight else ()

    def add(self, group: Sequence[Request], *, readmitted: bool = False) -> None:
        """Queue all samples of one request; they may bring output tokens of an earlier life. The
        first one computes the prompt, the others fork its blocks. Raises `InvalidArgument`,
        `AlreadyExists` for an id that lives, `ResourceExhausted` when its tenant's queue is full; what was
        accepted before and is `readmitted` is not subject to that.
        """
        check_group(group, self.max_context)
        request_id = group[0].request_id
        if request_id in self._requests:
            raise AlreadyExists(f"request_id: {request_id!r} is taken by a live request")
        if not readmitted:
            self._check_queue(group[0].tenant)
        samples = [self._sample(request) for request in group]
        self._requests[request_id] = {sample.request.sample_index: sample for sample in samples}
        self._num_samples += len(samples)
        self._of_tenant[group[0].tenant] += len(samples)
        leader, *followers = samples
        leader.lead(followers)
        self._planner.enqueue(leader)

    def adopt(
        self, transfer: int, group: Sequence[Request], standings: Mapping[int, Standing]
    ) -> None:
        """Let all samples of a request run on from the blocks that came with a transfer.

        Raises `TransferFailed`, changing nothing, when those are not what the samples need.
        """
        request_id = group[0].request_id
        if request_id in self._requests:
            raise AlreadyExists(f"request_id: {request_id!r} is taken by a live request")
        claims = self.arrivals.claim(transfer, group, standings)
        samples = {request.sample_index: self._sample(request) for request in group}
        self._requests[request_id] = samples
        self._num_samples += len(samples)
        self._of_tenant[group[0].tenant] += len(samples)
        for index, sample in samples.items():
            sample.seq, sample.num_computed, sample.chain = claims[index]
            if sample.chain is not None:
                known = sample.request.prompt_token_ids + sample.request.output_token_ids
                sample.chain.feed(known[sample.chain.num_tokens :])
            self._planner.adopt(sample)

    def abort(
        self,
        request_id: str,
        sample_index: int | None = None,
        reason: FinishReason = FinishReason.ABORT,
    ) -> Sequence[TokenEvent]:
        """End a request, or one sample of it, and free its blocks at once. Unknown ids: nothing."""
        samples = self._requests.get(request_id, {})
        chosen = [
            sample
            for index, sample in samples.items()
            if sample_index is None or index == sample_index
        ]
        return [self._end(sample, sample.event(finish=reason)) for sample in chosen]

    def expire(self, now: float) -> Sequence[TokenEvent]:
        """End every sample whose deadline has passed. Call it before `schedule`."""
        events: list[TokenEvent] = []
        for request_id, index in self._deadlines.pop_due(now):
            sample = self._requests.get(request_id, {}).get(index)
            # the id may have been used again since, with a later deadline
            if sample is None or sample.request.deadline is None or sample.request.deadline > now:
                continue
            events.append(self._end(sample, sample.event(finish=FinishReason.DEADLINE)))
        return events

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, or None: enough are in flight, or there is nothing to compute yet.

        now: `time.monotonic()`, for queue times only. The plan must be sent.
        """
        if len(self._in_flight) >= self._config.max_in_flight:
            return None
        if self._in_flight and (self._probation or self._in_flight[-1].alone):
            return None  # it must be known of which plan ranks die
        if len(self._in_flight) >= self._config.num_stages and self._planner.places.lopsided:
            return None  # whoever comes would have to wait for it
        alone = self._probation.next()
        draft = self._planner.plan(now, alone)
        if not draft.rows and self._probation:
            moves, alone = draft.moves, None if alone else self._probation.first
            draft = self._planner.plan(now, alone)
            draft.moves = [*moves, *draft.moves]
        if not draft.rows and not draft.moves:
            return None
        step, self._next_step = self._next_step, self._next_step + 1
        tokens = sum(row.num_new for row in draft.rows)
        sampling, on_probation = frozenset(draft.sampling), alone is not None
        self._in_flight.append(InFlight(step, draft.samples, sampling, tokens, on_probation))
        finished, self._planner.dismissed = self._planner.dismissed, []
        return draft.finish(self._epoch, step, finished)

    def update(self, result: StepResult) -> Sequence[TokenEvent]:
        """Take in the oldest plan's result.

        Raises `GroupLost` when it is another plan's result, or not an answer to all of it.
        """
        if result.epoch != self._epoch:
            self.foreign_results += 1
            return []
        due = self._in_flight[0].step if self._in_flight else None
        if result.step != due:
            text = f"the result of step {result.step} came, that of {due} is due"
            raise GroupLost(text, crashed=True)
        plan = self._in_flight[0]
        if self._cache.loads is not None:
            self._cache.loads.rates.on_step(len(plan.samples), plan.num_tokens, result.execute_s)
        events = list(self._events(plan, result))
        self._in_flight.popleft()
        return events

    def moved(self, report: MoveReport, now: float) -> None:
        """Take in what one rank says of moves. now: as in `schedule`.

        Raises `GroupLost` for a rank that was not asked.
        """
        if self._cache.loads is None:
            raise GroupLost("a rank speaks of moves, and there are no tiers")
        for moved in report.moved:
            ended = self._cache.loads.settle(moved, now)
            if ended is not None:
                self._planner.end_load(ended)

    def drain_queue_times(self) -> list[float]:
        """Seconds from arrival to the first step, of the requests begun since the last call."""
        times = list(self._planner.queue_times)
        self._planner.queue_times.clear()
        return times

    def drain_prefix_changes(self) -> PrefixUpdate | None:
        """The cached prefixes that came and went since the last call, if they are recorded."""
        return self._cache.drain_changes()

    def list_prefixes(self) -> None:
        """Let the next `drain_prefix_changes` list all cached prefixes."""
        self._cache.list_prefixes()

    def block_map(self) -> bytes:
        """See `KVCacheManager.block_map`."""
        return self._cache.block_map()

    def stats(self) -> SchedulerStats:
        """Figures as of now. O(1)."""
        return SchedulerStats(
            running=self.num_running,
            waiting=self.num_waiting,
            blocks_total=self._cache.num_blocks,
            blocks_free=self._cache.num_free,
            blocks_cached=self._cache.num_cached,
            prefix_queried=self._planner.prefix_queried,
            prefix_hit=self._planner.prefix_hit,
            preemptions=self._planner.preemptions,
            steps=self._next_step - len(self._in_flight),
            tiers=None if self._cache.loads is None else self._cache.loads.tiers.stats(),
        )

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless all books agree. O(samples + blocks); for tests."""
        self._cache.check_integrity()
        audit_running(self._planner, self._cache)
        samples = [sample for group in self._requests.values() for sample in group.values()]
        require(all(self._requests.values()), "a request without samples is kept")
        require(len(samples) == self._num_samples, "samples are miscounted")
        tenants = Counter(sample.request.tenant for sample in samples)
        require(tenants == self._of_tenant, "samples of tenants are miscounted")
        audit_states(samples, self._planner, self._in_flight)
        on_probation = sum(sample.probation > 0 for sample in samples)
        require(on_probation == len(self._probation), "samples on probation are miscounted")

    def places_of(self, tenant: str) -> tuple[int, int]:
        """Samples of the tenant that run, and how many may wait. Safe to call from any thread: it
        may be a step old."""
        return self._planner.running_of(tenant), self._most_queued(tenant)

    def _most_queued(self, tenant: str) -> int:
        own = self._config.tenants.of(tenant).max_queued
        return self._config.max_queued if own is None else min(own, self._config.max_queued)

    def _check_queue(self, tenant: str) -> None:
        """Raise `ResourceExhausted` where the tenant has as many samples waiting as it may."""
        most = self._most_queued(tenant)
        if self._of_tenant.get(tenant, 0) < most:
            return
        waiting = self._of_tenant[tenant] - self._planner.running_of(tenant)
        if waiting >= most:
            raise ResourceExhausted(
                f"max_queued of tenant {tenant!r}: the queue is full, "
                f"{waiting} samples wait, {most} may",
                # about as long as the request admitted last has waited
                min(max(self._planner.last_queue_time, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
            )

    def _sample(self, request: Request) -> Sample:
        sample = Sample.of(request, self._next_order, self.max_context, self._config.eos_token_ids)
        # what was computed when the ranks died reached so far
        alone = max(request.probation, self._config.max_in_flight) if request.probation else 0
        self._probation.add(sample, alone)
        self._next_order += 1
        if request.deadline is not None:
            self._deadlines.push(request.deadline, request.key)
        return sample

    def _events(self, plan: InFlight, result: StepResult) -> Iterator[TokenEvent]:
        tokens = {token.seq: token for token in result.sampled}
        failures = {failure.seq: failure for failure in result.failures}
        scores = {run.seq: run for run in result.prompt_logprobs}
        missing = plan.sampling - tokens.keys() - failures.keys()
        unasked = (tokens.keys() - plan.sampling) | (
            (failures.keys() | scores.keys()) - plan.samples.keys()
        )
        if missing or unasked:
            raise GroupLost(
                f"step {plan.step}: no answer for sequences {sorted(missing)}, "
                f"unasked answers for {sorted(unasked)}",
                crashed=True,
            )
        for seq, sample in plan.samples.items():
            if sample.state is State.ENDED:
                continue  # its last tokens were counted on in vain
            if seq in failures:
                event = sample.event(finish=FinishReason.ERROR, error=error_of(failures[seq]))
                yield self._end(sample, event)
                self._cache.forget(sample.chain)
                continue
            run = sample.take_scores(scores.get(seq))
            if seq in tokens:
                finish = sample.accept(tokens[seq])
                self._probation.gave_token(sample)
                self._planner.waiting.charge_output(sample.request.tenant, 1)
                event = sample.event(tokens[seq], finish, scores=run)
                yield event if finish is None else self._end(sample, event)
            elif run is not None:
                yield sample.event(scores=run)

    def _end(self, sample: Sample, event: TokenEvent) -> TokenEvent:
        """Let go of a sample whose last event this is."""
        waiting, heirs = self._planner.waiting, sample.followers
        if sample.state is State.FOLLOWING and sample.leader is not None:
            sample.leader.followers.remove(sample)
        elif sample.state in (State.RUNNING, State.LEAVING, State.LOADING):
            if sample.state is State.LOADING:
                self._planner.stop_loading(sample)
            else:
                self._planner.dismiss(sample)
            if heirs:
                waiting.push_front(heirs[0].inherit())
        elif heirs:
            waiting.replace(sample, heirs[0].inherit())
        else:
            waiting.remove(sample)
        sample.state = State.ENDED
        self._probation.remove(sample)
        self._forget(sample)
        return event

    def _forget(self, sample: Sample) -> None:
        request_id, index = sample.request.key
        samples = self._requests[request_id]
        del samples[index]
        if not samples:
            del self._requests[request_id]
        self._num_samples -= 1
        self._of_tenant[sample.request.tenant] -= 1
        if not self._of_tenant[sample.request.tenant]:
            del self._of_tenant[sample.request.tenant]
        if len(self._deadlines) > 2 * self._num_samples + 64:
            self._deadlines.sweep(
                (live.request.deadline, live.request.key)
                for group in self._requests.values()
                for live in group.values()
                if live.request.deadline is not None
            )
