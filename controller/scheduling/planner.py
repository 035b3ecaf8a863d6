"""Who computes in the next step, who may start, and who must give its blocks to others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from phalanx.controller.kvcache.manager import KVCacheManager

from .config import SchedulerConfig
from .places import FAVOURED, Places
from .plan import PlanDraft
from .queue import WaitingQueue
from .sample import Sample, State


class StepPlanner:
    """Fills one step, in this order, until its budget of tokens is used up:

    1. Running samples that need one token: the streams. The budget always holds them all.
    2. Running samples that need more: the next chunk of their prompts, oldest first.
    3. The head of the queue, again and again. A head that does not fit waits, and everybody
       behind it.

    While several tenants come, what 2 and 3 have for those that run less than their share goes
    before, with `FAVOURED` of the budget, and the last places are theirs (`places.Places`);
    what others have gets `OTHERS` of it at most.

    A running sample that finds no block takes those of the youngest one. The loser goes back to
    the head of the queue and computes its tokens again later, the output included. A sample that
    has lost `max_preemptions` times is admitted only with room for its whole length: it never
    needs a further block, and is never chosen again. Hence the oldest sample always advances, and
    every sample ends.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCacheManager) -> None:
        self._config, self._cache = config, cache
        self.waiting = WaitingQueue(config.tenants, config.max_bypass, config.aging_s)
        self.places = Places(config.tenants, config.max_running)
        self.running: dict[int, Sample] = {}
        """By attempt id."""
        self.dismissed: list[int] = []
        """Attempts that the ranks must be told to forget."""
        self.queue_times: deque[float] = deque(maxlen=config.max_queued)
        """Seconds from arrival to the first step, of the requests begun last."""
        self.last_queue_time = 0.0
        self.preemptions = 0
        self.prefix_queried = 0
        self.prefix_hit = 0
        self.loading: dict[int, list[Sample]] = {}
        """Who waits for a load, in order."""
        self._next_seq = 0
        self._loads: dict[str, float] = {}
        """What tenants run by their weights, when the plan was begun."""
        self._crowded = False
        """Whether there was no room for who is on probation, the last time."""
        self.arrived: set[int] = set()
        """Running attempts that the ranks have not been told of: their blocks came from another
        replica."""
        self.reserved: set[int] = set()
        """Attempts whose blocks are still to come, and which have a place."""
        self.copied: set[int] = set()
        """Tables of prefixes that are still to come."""
        self.held: set[int] = set()
        """Tables of transfers to other replicas."""

    def plan(self, now: float, alone: Sample | None = None) -> PlanDraft:
        """The work of the next step; its rows are empty when there is none. alone: nobody else's;
        without it, nobody's who is on probation."""
        draft = PlanDraft(self._config.max_tokens_per_step, self._config.attention_reach)
        if (loads := self._cache.loads) is not None:
            busy = bool(self.running or self.waiting)
            loads.tiers.begin_plan(loads.rates.stores(busy=busy))
            for load in loads.overdue(now):
                self.end_load(load)
        self.places.forget(now)
        self._loads = {tenant: self.places.load(tenant) for tenant in self.places.running}
        if alone is None:
            self._plan_together(draft, now)
        else:
            self._plan_alone(draft, alone, now)
        for sample in draft.samples.values():
            self._cache.commit(sample.seq, sample.num_computed)
            if sample.followers and sample.has_prompt:
                self._release_followers(sample)
        self._cache.settle_states()
        if loads is not None:
            draft.moves = loads.tiers.take_orders()
        return draft

    def _plan_together(self, draft: PlanDraft, now: float) -> None:
        chunks = self._continue_streams(draft)
        if self.places.contended:
            self._favour(draft, chunks, now)
        self._continue_chunks(draft, chunks)
        self._admit(draft, now)

    def _plan_alone(self, draft: PlanDraft, sample: Sample, now: float) -> None:
        self._crowded = False
        if sample.state is State.WAITING:
            self._crowded = not (self.has_places(1) and self._begin(draft, sample, now))
        elif sample.remaining > 1:
            self._continue_chunks(draft, [sample])
        elif not sample.is_complete and (blocks := self._grow(sample)) is not None:
            self._add(draft, sample, self._introduce(draft, sample) or blocks)

    def running_of(self, tenant: str) -> int:
        """Samples of the tenant that hold blocks."""
        return self.places.running[tenant]

    def enqueue(self, sample: Sample) -> None:
        """A sample has arrived."""
        request = sample.request
        self.places.saw(request.tenant, request.arrival, len(request.prompt_token_ids))
        self.waiting.append(sample)

    def end_load(self, load: int) -> None:
        """What was waited for is in the pool, or will not come."""
        for sample in reversed(self.loading.pop(load, [])):
            sample.state = State.WAITING
            self.waiting.push_front(sample)

    def stop_loading(self, sample: Sample) -> None:
        """The sample waits for its load no longer."""
        if sample.load is not None:
            self.loading[sample.load].remove(sample)

    def dismiss(self, sample: Sample) -> None:
        """Take a running sample's blocks away. They may be handed out at once."""
        del self.running[sample.seq]
        self.places.ended(sample.request.tenant)
        self._cache.commit(sample.seq, sample.num_computed)
        self._cache.release(sample.seq)
        if sample.seq in self.arrived:
            self.arrived.discard(sample.seq)
        else:
            self.dismissed.append(sample.seq)

    def take_seq(self) -> int:
        """A new attempt's id."""
        self._next_seq += 1
        return self._next_seq - 1

    def has_places(self, count: int) -> bool:
        """Whether so many more samples may run."""
        return len(self.running) + len(self.reserved) + count <= self._config.max_running

    def adopt(self, sample: Sample) -> None:
        """Let a sample run whose attempt has its blocks already."""
        sample.state, sample.was_admitted = State.RUNNING, True
        self.running[sample.seq] = sample
        self.places.began(sample.request.tenant)
        self.arrived.add(sample.seq)

    def _continue_streams(self, draft: PlanDraft) -> list[Sample]:
        """One token for each that needs one; returns those that need more, oldest first."""
        chunks: list[Sample] = []
        tight = self._cache.num_free < len(self.running)
        for sample in sorted(self.running.values(), key=self._dearest if tight else _by_arrival):
            if sample.state is not State.RUNNING or sample.is_complete or sample.probation:
                continue  # preempted a moment ago, or only its results are missing, or not now
            if sample.remaining > 1:
                chunks.append(sample)
            elif (blocks := self._grow(sample)) is not None:
                self._add(draft, sample, self._introduce(draft, sample) or blocks)
        return sorted(chunks, key=_by_arrival) if tight else chunks

    def _continue_chunks(self, draft: PlanDraft, chunks: Iterable[Sample]) -> None:
        for sample in chunks:
            has_row = sample.seq in draft.samples
            if draft.budget and sample.state is State.RUNNING and not has_row:
                # room for all known tokens came with the admission
                self._add(draft, sample, self._introduce(draft, sample))

    def _introduce(self, draft: PlanDraft, sample: Sample) -> list[int]:
        """Tell the ranks of a sample that has arrived; all its blocks, none of any other."""
        if sample.seq not in self.arrived:
            return []
        self.arrived.discard(sample.seq)
        draft.new.append(sample.new_sequence())
        return list(self._cache.table(sample.seq))

    def _favour(self, draft: PlanDraft, chunks: Sequence[Sample], now: float) -> None:
        """Prompts of tenants below their share come first, with `FAVOURED` of the budget."""
        budget, most = draft.budget, self._config.max_tokens_per_step
        draft.budget = favoured = int(FAVOURED * budget)
        favours = self.places.favours
        self._continue_chunks(draft, [item for item in chunks if favours(item.request.tenant)])
        self._admit(draft, now, favoured=True)
        used = favoured - draft.budget
        draft.budget = min(budget - used, self.places.for_others(most, used))

    def _add(self, draft: PlanDraft, sample: Sample, blocks: list[int]) -> None:
        """Let the sample compute; where there are states, say where its own are."""
        first = sample.num_computed
        forks_at = sample.num_prompt - 1 if sample.followers else None
        last = first + draft.count(sample)
        draft.add(
            sample, blocks, self._cache.use_states(sample.seq, first, last, forks_at=forks_at)
        )

    def _grow(self, sample: Sample) -> list[int] | None:
        """Blocks for one more token; None if this sample itself had to give way.

        Nobody who has a row in this plan can lose it: those who give way first have their turn last.
        """
        while (blocks := self._cache.append(sample.seq, sample.num_computed + 1)) is None:
            victim = max(filter(self._may_preempt, self.running.values()), key=self._dearest)
            self._preempt(victim)
            if victim is sample:
                return None
        return blocks

    def _dearest(self, sample: Sample) -> tuple[float, int, int]:
        """Who gives way last comes first: of tenants that run less by their weight, then the more
        urgent, then the older."""
        request = sample.request
        return self._loads.get(request.tenant, 0.0), request.priority, sample.order

    def _may_preempt(self, sample: Sample) -> bool:
        free = sample.state is not State.LEAVING
        return free and sample.preemptions < self._config.max_preemptions

    def _preempt(self, sample: Sample) -> None:
        self.dismiss(sample)
        sample.state = State.WAITING
        sample.preemptions += 1
        self.preemptions += 1
        self.waiting.push_front(sample)

    def _release_followers(self, leader: Sample) -> None:
        """From the next plan on, the leader's blocks can be forked."""
        for follower in reversed(leader.followers):
            follower.leader, follower.fork_of = None, leader.seq
            if leader.chain is not None:
                follower.chain = leader.chain.branch(follower.request.prompt_token_ids)
                follower.chain.feed(follower.request.output_token_ids)
            follower.state = State.WAITING
            self.waiting.push_front(follower)
        leader.followers = []

    def _admit(self, draft: PlanDraft, now: float, *, favoured: bool = False) -> None:
        """Begin with those that wait; favoured: with those of tenants below their share only."""
        promised = self._num_loading + self.waiting.num_apart
        while draft.budget and self.waiting.has_head and self.has_places(1 + promised):
            if self._crowded and self.waiting.num_apart:
                return  # who is on probation is to find room
            sample = self._next(favoured=favoured)
            if sample is not None and self._begin_load(sample, now):
                continue
            if sample is None or not self._begin(draft, sample, now):
                return

    def _begin(self, draft: PlanDraft, sample: Sample, now: float) -> bool:
        """Let a waiting sample run. False: it must wait."""
        # a preempted sample's last tokens must be here before it can be described in full
        if sample.pending or not self._open_table(sample, draft):
            return False
        self.waiting.remove(sample)
        sample.state = State.RUNNING
        self.running[sample.seq] = sample
        self.places.began(sample.request.tenant)
        if not sample.was_admitted and sample.fork_of is None:
            self.last_queue_time = now - sample.request.arrival
            self.queue_times.append(self.last_queue_time)
            self.waiting.charge_input(sample.request.tenant, sample.num_prompt)
        sample.was_admitted, sample.fork_of, sample.load = True, None, None
        draft.new.append(sample.new_sequence())
        self._add(draft, sample, list(self._cache.table(sample.seq)))
        return True

    def _next(self, *, favoured: bool) -> Sample | None:
        """Whose turn it is, of those that may take a place."""
        places, free = (
            self.places,
            self._config.max_running - len(self.running) - len(self.reserved),
        )

        def may(tenant: str) -> bool:
            return places.favours(tenant) if favoured else places.may_take(tenant, free)

        head, returned = self.waiting.head, self.waiting.has_returned and not favoured
        if returned or may(head.request.tenant):
            return head
        return self.waiting.first_of(may)

    @property
    def _num_loading(self) -> int:
        """Samples that will have a place when their loads end."""
        return sum(map(len, self.loading.values()))

    def _begin_load(self, sample: Sample, now: float) -> bool:
        """Let the sample wait for blocks of lower tiers, where that is worth it; others go on."""
        loads = self._cache.loads
        if loads is None or sample.load is not None or sample.wants_prompt_logprobs:
            return False
        if sample.pending or self._leader(sample) is not None:
            return False
        self._make_chain(sample)
        if sample.chain is None:
            return False
        cached = self._cache.match(sample.chain, sample.length)
        fresh = self._cache.blocks_for(self._room(sample)) - len(cached)
        if self._cache.num_free < fresh + len(cached) + self.growth():
            return False  # it has to wait for room in any case
        sample.load = loads.begin(sample.chain, cached, sample.length, fresh, now)
        if sample.load is None:
            return False
        self.waiting.remove(sample)
        sample.state = State.LOADING
        self.loading.setdefault(sample.load, []).append(sample)
        return True

    def _make_chain(self, sample: Sample) -> None:
        if sample.chain is None and self._config.prefix_caching:
            tokens = sample.request.prompt_token_ids + sample.request.output_token_ids
            sample.chain = self._cache.chain(sample.request.tenant, tokens)

    def _room(self, sample: Sample) -> int:
        """Tokens that an admission makes room for: the known ones and one more, as a rule."""
        most = sample.limit - 1  # the last token is never computed
        return min(sample.length + 1, most) if self._may_preempt(sample) else most

    def _leader(self, sample: Sample) -> Sample | None:
        """Whose blocks the sample can share."""
        leader = None if sample.fork_of is None else self.running.get(sample.fork_of)
        return leader if leader is not None and self._cache.can_fork(leader.seq) else None

    def _open_table(self, sample: Sample, draft: PlanDraft) -> bool:
        """Give the sample blocks for all its known tokens and one more. False: it must wait."""
        self._make_chain(sample)
        room, reserve = self._room(sample), self.growth()
        if (leader := self._leader(sample)) is not None:
            opened = draft.fork(self._cache, self._next_seq, leader, sample, room, reserve)
        else:
            opened = self._match(sample, room, reserve)
        if opened:
            sample.seq = self.take_seq()
        return opened

    def growth(self) -> int:
        """Blocks that an admission leaves free, lest it soon cost somebody his place."""
        growth = self._config.reserve_tokens
        return sum(
            self._cache.blocks_for(min(sample.limit - sample.length, growth))
            for sample in self.running.values()
        )

    def _match(self, sample: Sample, room: int, reserve: int) -> bool:
        """Start with what the prefix cache holds."""
        reads = not sample.wants_prompt_logprobs
        cached = self._cache.match(sample.chain, sample.length) if reads else []
        blocks = self._cache.allocate(
            self._next_seq, sample.chain, room, cached=cached, reserve=reserve
        )
        if blocks is None:
            return False
        sample.num_computed = len(cached) * self._cache.block_size
        if not sample.was_admitted:
            sample.cached_prompt_tokens = min(sample.num_computed, sample.num_prompt)
            if sample.chain is not None and reads:
                self.prefix_queried += sample.num_prompt
                self.prefix_hit += sample.cached_prompt_tokens
        return True


def _by_arrival(sample: Sample) -> int:
    return sample.order
