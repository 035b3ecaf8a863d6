"""One rank: load the shard, then execute plans, one after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.errors import GroupLost, InvalidArgument, RequestFailed
from phalanx.protos.recording import records_steps
from phalanx.protos.shards import MAX_LOGIT_ROWS, cut_model, cut_stages, state_layers
from phalanx.protos.specs import LoadReport, WorkerSpec, activation_dtype
from phalanx.protos.steps import (
    PromptLogprobs,
    Row,
    SampledToken,
    SequenceFailure,
    StepPlan,
    StepResult,
)

from .batch import UNKNOWN, Batch, BatchBuilder, SequenceState
from .cache import PagedCache, StatePool, layer_caches, pool_arrangement
from .checks import check_ids
from .decoder import Decoder
from .exchange import BlockExchange
from .graphs.device import Recorder
from .graphs.steps import Chosen, Model, StepGraphs, Tail, ending
from .layers.rope import RotaryTable
from .loading.weights import CheckpointWeights, Weights
from .parallel import TensorParallel
from .pending import PendingStep
from .pipeline import MOST_UNHEARD, Pipeline, SingleStage, split_rows
from .sampling.grammars import Grammars
from .sampling.logits import is_plainly_greedy
from .sampling.plain import PlainChoice
from .sampling.sampler import BROKEN, Sampled, Sampler, SampleRow, failed
from .tiers import RankTiers

MOST_PENDING = 1
"""Steps whose tokens the host has not read, when the next one is queued."""


class Engine:
    """A rank's model, cache and sequences. Plans come in order and are executed as they come.

    With a recorder, decode steps are recorded and replayed, and steps whose rows only want the
    likeliest token, or a draw without filters, are queued without waiting for their tokens.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        group: TensorParallel,
        backend: KernelBackend,
        kernels: str | None = None,
        pipeline: Pipeline | None = None,
        recorder: Recorder | None = None,
        weights: Weights | None = None,
    ) -> None:
        """kernels: for the load report, which backend this is and why; its name by default.
        group: the ranks of this one's stage. pipeline: the stages; one, by default.
        A recorder is used where model and backend can be recorded. weights: the checkpoint's."""
        self._spec, self._group, self._backend = spec, group, backend
        self._pipeline = pipeline = pipeline or SingleStage()
        self._kernels = kernels or backend.name
        model = spec.model
        self._device = torch.device(spec.device)
        dtype = getattr(torch, activation_dtype(spec.dtype))
        self._weights = weights or CheckpointWeights.at(spec.checkpoint)
        self._names = self._weights.names(model)
        self._stage = stage = cut_stages(model, pipeline.size)[pipeline.stage]
        place = (group, backend, dtype, self._device, stage)
        self._decoder = Decoder(model, self._names, *place, weights=spec.dtype)
        part = cut_model(model, group.size, group.rank)
        self._recorder = recorder if records_steps(model, stage.count) else None
        self._cache = PagedCache(
            spec.cache,
            stage.layers.size - state_layers(model, stage),
            part.heads.kv.size,
            model.head_dim,
            self._device,
            spare_blocks=self._recorder is not None,
            arrange=pool_arrangement(backend, dtype),
        )
        self.tiers = RankTiers(spec, stage, group.rank, part.heads.kv, self._cache)
        self._states: StatePool | None = None
        if model.state is not None and part.state is not None:
            slots = spec.cache.num_states
            layers = state_layers(model, stage)
            self._states = StatePool(model.state, part.state, layers, slots, dtype, self._device)
        self._layers = layer_caches(model, stage, self._cache, self._states)
        rotary, local = (
            RotaryTable(rope, model.max_context, dtype, self._device) if rope else None
            for rope in (model.rope, model.local_rope)
        )
        block_size = spec.cache.block_size
        self._builder = BatchBuilder(
            rotary, backend, block_size, self._device, local, has_states=model.state is not None
        )
        self._sampler = Sampler(group, part.vocab, model.vocab_size, spec.eos_token_ids)
        self._grammars = Grammars(spec.tokenizer, model.vocab_size, spec.eos_token_ids)
        self._unheard: deque[list[SequenceState]] = deque()
        self._choice = PlainChoice(group, part.vocab, backend)
        self._graphs: StepGraphs | None = None
        self._sequences: dict[int, SequenceState] = {}
        self._pending: deque[PendingStep] = deque()
        self._next_step = 0
        self._finished_at = 0.0

    def load(self, progress: Callable[[int, int], None] = lambda done, total: None) -> LoadReport:
        """Fill the weights, slice by slice; `progress` gets elements done and in all."""
        if self._stage.is_last:
            self._grammars.prepare()
        pieces = [piece for stage in self._decoder.stages for piece in stage]
        weight_bytes = self._decoder.weight_bytes
        used = {piece.source for piece in pieces}
        del pieces
        unused = self._weights.fill(
            self._decoder,
            self._spec.model,
            self._names,
            progress,
            partial=self._stage.count > 1,
        )
        self._prepare()
        kernels = self._kernels
        if self._graphs is not None:
            kernels += f"; decode steps of up to {self._graphs.sizes[-1]} rows recorded"
        return LoadReport(
            rank=self._stage.index * self._group.size + self._group.rank,
            weight_bytes=weight_bytes,
            kv_bytes=self._cache.num_bytes,
            tensors_used=len(used),
            tensors_ignored=unused,
            kernels=kernels,
            state_bytes=0 if self._states is None else self._states.num_bytes,
        )

    def open_exchange(self, rank: int, secret: bytes, host: str) -> BlockExchange | None:
        """Where ranks of other replicas get blocks of this one; None with state spaces."""
        if self._states is not None:
            return None
        return BlockExchange(self._spec, rank, self._cache, secret, host)

    @torch.inference_mode()
    def _prepare(self) -> None:
        """What can be done once the weights are packed."""
        self._decoder.fuse(self._layers)
        if self._stage.is_last:
            self._grammars.settle()
        if self._recorder is None:
            return
        cache, decoder = self._layers, self._decoder
        model = Model(
            self._builder, lambda batch: decoder(batch, cache), decoder.logits, self._choice
        )
        self._graphs = StepGraphs.of(self._spec, model, self._backend)
        if self._graphs is not None:
            self._graphs.record(self._recorder)

    def step(self, plan: StepPlan) -> StepResult:
        """Execute one plan. Raises `GroupLost` when the plan is not the one expected."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Execute or queue one plan, raising as `step` does. Results may be taken late, in any
        order, but whoever queues many finds the host waiting for the earlier ones."""
        started = time.perf_counter()
        if plan.epoch != self._spec.epoch or plan.step != self._next_step:
            raise GroupLost(
                f"plan {plan.epoch}.{plan.step} came, {self._spec.epoch}.{self._next_step} is due"
            )
        check_ids(plan, self._spec)
        self._next_step += 1
        for seq in plan.finished:
            self._sequences.pop(seq, None)
            if self._graphs is not None:
                self._graphs.forget(seq)
        for new in plan.new:
            self._sequences[new.seq] = SequenceState.of(new)
        self.tiers.begin(plan)
        self._cache.copy_blocks(plan.copies)
        if not plan.rows:
            return PendingStep.done(self._result(plan, started))
        if self._graphs is None:
            return PendingStep.done(self._run(plan, started))
        states = self._builder.advance(plan.rows, self._sequences)
        step = self._queue(self._graphs, plan, states, started)
        if step is None:
            self._settle(0)
            step = PendingStep.done(self._run(plan, started, states))
        return step

    def _queue(
        self, graphs: StepGraphs, plan: StepPlan, states: list[SequenceState], started: float
    ) -> PendingStep | None:
        """The step on the device, without waiting; None where something needs the host."""
        self._settle(MOST_PENDING)
        sampled = [state for state in states if state.num_computed == len(state.token_ids)]
        fed = [state for state in states if state.token_ids[-1] == UNKNOWN]
        if not graphs.fits(sampled) or any(map(_scores, plan.rows, states)):
            return None
        if not all(map(graphs.feeds, fed)):
            self._settle(0)
        tail = ending([_sample_row(state) for state in sampled], self._spec.model.vocab_size)
        decode = len(sampled) == len(states) == sum(row.num_new for row in plan.rows)
        chooses = tail is not Tail.HIDDEN and graphs.offers(tail)
        if chooses and decode:
            return self._queued(plan, sampled, graphs.choose(sampled, tail), started)
        if chooses:
            batch = self._builder.build(plan.rows, states)
            graphs.feed(batch.token_ids, batch.fed)
            hidden = self._decoder(batch, self._layers)
            chosen = graphs.choose_from(hidden, sampled, tail)
            return self._queued(plan, sampled, chosen, started)
        if not decode:
            return None
        self._settle(0)
        tokens, failures = self._sample(sampled, graphs.compute(sampled))
        return PendingStep.done(self._result(plan, started, tokens, failures))

    def _queued(
        self, plan: StepPlan, sampled: list[SequenceState], chosen: Chosen, started: float
    ) -> PendingStep:
        """Sequences grow by a token that is not known before the step's result is asked for."""
        places = [len(state.token_ids) for state in sampled]
        for state in sampled:
            state.token_ids.append(UNKNOWN)

        def finish() -> StepResult:
            tokens, failures = [], []
            for state, place, token, broken in zip(sampled, places, *chosen.get(), strict=True):
                state.token_ids[place] = token
                if broken:
                    failures.append(SequenceFailure(state.seq, BROKEN))
                else:
                    tokens.append(SampledToken(state.seq, token))
            return self._result(plan, started, tokens, failures)

        self._pending.append(PendingStep(finish, lambda: chosen.download.arrived))
        return self._pending[-1]

    def _settle(self, most: int) -> None:
        """Read the tokens of all queued steps but the last `most`."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    def _run(
        self, plan: StepPlan, started: float, advanced: list[SequenceState] | None = None
    ) -> StepResult:
        """The step with the host's sampler. advanced: the rows' states, where they already are."""
        sampled: list[SampledToken] = []
        failures: list[SequenceFailure] = []
        scores: list[PromptLogprobs] = []
        for rows in split_rows(plan.rows, self._stage.count):
            self._hear(rows)
            states = advanced or self._builder.advance(rows, self._sequences)
            batch = self._builder.build(rows, states)
            hidden = self._forward(batch)
            if hidden is None:
                continue
            tokens, failed = self._sample(batch.sampled, hidden[: len(batch.sampled)])
            scored, unscored = self._score(batch, hidden[len(batch.sampled) :])
            sampled, scores, failures = sampled + tokens, scores + scored, failures + failed
            failures += unscored
        return self._result(plan, started, sampled, failures, scores)

    def _forward(self, batch: Batch) -> Tensor | None:
        """This stage's layers; None where the next one goes on."""
        before = None
        if not self._stage.is_first:
            shape = (len(batch.token_ids), self._spec.model.hidden_size)
            before = self._pipeline.receive(shape, self._decoder.carried, self._device)
        hidden = self._decoder(batch, self._layers, before)
        if self._stage.is_last:
            return hidden
        self._pipeline.send(hidden)
        if batch.sampled:
            self._unheard.append(batch.sampled)
        return None

    def _hear(self, rows: Sequence[Row]) -> None:
        """Take in the tokens that these rows count on, as late as can be: until then, this stage
        need not wait for the last one."""
        needed = {row.seq for row in rows}
        while self._unheard and (
            len(self._unheard) > MOST_UNHEARD * self._stage.count
            or any(state.seq in needed for states in self._unheard for state in states)
        ):
            states = self._unheard.popleft()
            for state, token in zip(states, self._pipeline.hear(len(states)), strict=True):
                state.token_ids.append(token)

    def _result(
        self,
        plan: StepPlan,
        started: float,
        sampled: Sequence[SampledToken] = (),
        failures: Sequence[SequenceFailure] = (),
        scores: Sequence[PromptLogprobs] = (),
    ) -> StepResult:
        """The answer to a plan; a step's time does not count while the one before it ran."""
        before, self._finished_at = self._finished_at, time.perf_counter()
        began = max(started, before)
        return StepResult(
            epoch=plan.epoch,
            step=plan.step,
            sampled=list(sampled),
            prompt_logprobs=list(scores),
            failures=list(failures),
            execute_s=self._finished_at - began,
            idle_s=began - before if before else None,
        )

    def _sample(
        self, sampled: Sequence[SequenceState], hidden: Tensor
    ) -> tuple[list[SampledToken], list[SequenceFailure]]:
        tokens: list[SampledToken] = []
        failures: list[SequenceFailure] = []
        choices: list[Sampled] = []
        rows, lost = [], dict[int, Sampled]()
        for index, state in enumerate(sampled):
            allowed = None
            try:
                allowed = self._allowed(state)
            except (InvalidArgument, RequestFailed) as error:  # raised on every rank alike
                lost[index] = failed(error)
            rows.append(_sample_row(state)._replace(allowed=allowed))
        for start in range(0, len(rows), MAX_LOGIT_ROWS):
            part = slice(start, start + MAX_LOGIT_ROWS)
            choices += self._choose(hidden[part], rows[part])
        for index, failure in lost.items():
            choices[index] = failure
        for state, choice in zip(sampled, choices, strict=True):
            if choice.error is not None:
                failures.append(SequenceFailure(state.seq, choice.error, choice.field))
            # a failed sequence gets a token as well: a plan already sent may count on it
            state.token_ids.append(choice.token_id)
            if choice.error is None:
                token = SampledToken(state.seq, choice.token_id, choice.logprob, choice.top)
                tokens.append(token)
        if choices:
            self._pipeline.announce([choice.token_id for choice in choices])
        return tokens, failures

    def _allowed(self, state: SequenceState) -> bytes | None:
        """What the sequence's grammar allows next. Raises `InvalidArgument`."""
        if state.params.grammar is None:
            return None
        if state.grammar is None:
            state.grammar = self._grammars.begin(state.params.grammar)
        return state.grammar.allowed(state.token_ids[state.num_prompt :])

    def _choose(self, hidden: Tensor, rows: list[SampleRow]) -> list[Sampled]:
        """Logits are not made where nothing but the largest is asked for."""
        best = self._decoder.best(hidden) if all(map(is_plainly_greedy, rows)) else None
        if best is not None:
            return self._sampler.take_best(*best)
        return self._sampler.sample(self._decoder.logits(hidden), rows)

    def _score(
        self, batch: Batch, hidden: Tensor
    ) -> tuple[list[PromptLogprobs], list[SequenceFailure]]:
        """Log-probabilities of prompt tokens: row i of a sequence predicts token i + 1."""
        scores: list[PromptLogprobs] = []
        failures: list[SequenceFailure] = []
        start = 0
        for state, first, count in batch.scored:
            targets = state.token_ids[first + 1 : first + 1 + count]
            try:
                pairs = []
                for offset in range(0, count, MAX_LOGIT_ROWS):
                    part = slice(offset, min(offset + MAX_LOGIT_ROWS, count))
                    logits = self._decoder.logits(hidden[start:][part])
                    top = state.params.prompt_logprobs or 0
                    pairs += self._sampler.score(logits, targets[part], top)
            except RequestFailed as error:  # raised on every rank alike
                failures.append(SequenceFailure(state.seq, str(error)))
            else:
                tokens = [token for token, _ in pairs]
                tops = [top for _, top in pairs]
                scores.append(PromptLogprobs(state.seq, first + 1, tokens, tops))
            start += count
        return scores, failures


def _sample_row(state: SequenceState) -> SampleRow:
    return SampleRow(state.token_ids, state.num_prompt, state.params, state.sample_index)


def _scores(row: Row, state: SequenceState) -> bool:
    """Whether a row whose state is advanced has prompt tokens to score."""
    first = state.num_computed - row.num_new
    return state.params.prompt_logprobs is not None and first < state.num_prompt - 1
