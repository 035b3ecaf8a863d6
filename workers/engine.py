"""One rank: load the shard, then execute plans, one after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phalanx.kernels.interface import KernelBackend
from phalanx.protos.errors import GroupLost, RequestFailed
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

from .batch import Batch, BatchBuilder, SequenceState
from .cache import PagedCache, StatePool, layer_caches
from .checkpoint.source import open_checkpoint
from .decoder import Decoder
from .layers.rope import RotaryTable
from .loading.assign import fill
from .models.registry import tensor_names, tensor_shapes
from .parallel import TensorParallel
from .pipeline import MOST_UNHEARD, Pipeline, SingleStage, split_rows
from .sampling.grammars import Grammars
from .sampling.sampler import Sampled, Sampler, SampleRow, is_plainly_greedy
from .states import check_states


class Engine:
    """A rank's model, cache and sequences. Plans come in order and are executed as they come."""

    def __init__(
        self,
        spec: WorkerSpec,
        group: TensorParallel,
        backend: KernelBackend,
        kernels: str | None = None,
        pipeline: Pipeline | None = None,
    ) -> None:
        """kernels: for the load report, which backend this is and why; its name by default.
        group: the ranks of this one's stage. pipeline: the stages; one, by default."""
        self._spec, self._group, self._backend = spec, group, backend
        self._pipeline = pipeline = pipeline or SingleStage()
        self._kernels = kernels or backend.name
        model = spec.model
        self._device = torch.device(spec.device)
        dtype = getattr(torch, activation_dtype(spec.dtype))
        self._checkpoint = open_checkpoint(spec.checkpoint)
        self._names = tensor_names(model, self._checkpoint.kind, self._checkpoint.names())
        self._stage = stage = cut_stages(model, pipeline.size)[pipeline.stage]
        place = (group, backend, dtype, self._device, stage)
        self._decoder = Decoder(model, self._names, *place, int8=spec.dtype == "int8")
        part = cut_model(model, group.size, group.rank)
        self._cache = PagedCache(
            spec.cache,
            stage.layers.size - state_layers(model, stage),
            part.heads.kv.size,
            model.head_dim,
            self._device,
        )
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
        self._sequences: dict[int, SequenceState] = {}
        self._unheard: deque[list[SequenceState]] = deque()
        self._next_step = 0

    def load(self, progress: Callable[[int, int], None] = lambda done, total: None) -> LoadReport:
        """Fill the weights, slice by slice; `progress` gets elements done and in all."""
        if self._stage.is_last:
            self._grammars.prepare()
        pieces = [piece for stage in self._decoder.stages for piece in stage]
        weight_bytes = self._decoder.weight_bytes
        used = {piece.source for piece in pieces}
        del pieces
        unused = fill(
            self._decoder,
            self._checkpoint,
            permuted_heads=self._names.permuted_heads,
            ignored=self._names.ignored,
            elsewhere=self._elsewhere(),
            progress=progress,
        )
        self._decoder.fuse(self._layers)
        if self._stage.is_last:
            self._grammars.settle()
        return LoadReport(
            rank=self._stage.index * self._group.size + self._group.rank,
            weight_bytes=weight_bytes,
            kv_bytes=self._cache.num_bytes,
            tensors_used=len(used),
            tensors_ignored=unused,
            kernels=self._kernels,
            state_bytes=0 if self._states is None else self._states.num_bytes,
        )

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Execute one plan. Raises `GroupLost` when the plan is not the one expected."""
        started = time.perf_counter()
        if plan.epoch != self._spec.epoch or plan.step != self._next_step:
            raise GroupLost(
                f"plan {plan.epoch}.{plan.step} came, {self._spec.epoch}.{self._next_step} is due"
            )
        self._check_ids(plan)
        self._next_step += 1
        for seq in plan.finished:
            self._sequences.pop(seq, None)
        for new in plan.new:
            self._sequences[new.seq] = SequenceState.of(new)
        self._cache.copy_blocks(plan.copies)
        sampled: list[SampledToken] = []
        failures: list[SequenceFailure] = []
        scores: list[PromptLogprobs] = []
        for rows in split_rows(plan.rows, self._stage.count):
            self._hear(rows)
            batch = self._builder.build(rows, self._sequences)
            hidden = self._forward(batch)
            if hidden is None:
                continue
            tokens, failed = self._sample(batch, hidden[: len(batch.sampled)])
            scored, unscored = self._score(batch, hidden[len(batch.sampled) :])
            sampled, scores, failures = sampled + tokens, scores + scored, failures + failed
            failures += unscored
        return StepResult(
            epoch=plan.epoch,
            step=plan.step,
            sampled=sampled,
            prompt_logprobs=scores,
            failures=failures,
            execute_s=time.perf_counter() - started,
        )

    def _elsewhere(self) -> set[str]:
        """Tensors that only other stages need."""
        if self._stage.count == 1:
            return set()
        kind, present = self._checkpoint.kind, self._checkpoint.names()
        return set(tensor_shapes(self._spec.model, kind, present))

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

    def _check_ids(self, plan: StepPlan) -> None:
        """Compiled kernels read and write where these point, without looking."""
        check_states(plan.rows, self._spec.cache.num_states)
        blocks = [block for row in plan.rows for block in row.new_blocks]
        blocks += [block for copy in plan.copies for block in (copy.source, copy.target)]
        tokens = [token for new in plan.new for token in new.token_ids]
        limits = (self._spec.cache.num_blocks, self._spec.model.vocab_size)
        for name, ids, limit in zip(("block", "token"), (blocks, tokens), limits, strict=True):
            if ids and not 0 <= min(ids) <= max(ids) < limit:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise GroupLost(f"plan names {name} {wrong}, there are {limit}")

    def _sample(
        self, batch: Batch, hidden: Tensor
    ) -> tuple[list[SampledToken], list[SequenceFailure]]:
        tokens: list[SampledToken] = []
        failures: list[SequenceFailure] = []
        choices: list[Sampled] = []
        rows, lost = [], dict[int, str]()
        for index, state in enumerate(batch.sampled):
            allowed = None
            try:
                allowed = self._allowed(state)
            except RequestFailed as error:  # raised on every rank alike
                lost[index] = str(error)
            row = SampleRow(
                state.token_ids, state.num_prompt, state.params, state.sample_index, allowed
            )
            rows.append(row)
        for start in range(0, len(rows), MAX_LOGIT_ROWS):
            part = slice(start, start + MAX_LOGIT_ROWS)
            choices += self._choose(hidden[part], rows[part])
        for index, why in lost.items():
            choices[index] = Sampled(0, None, [], why)
        for state, choice in zip(batch.sampled, choices, strict=True):
            if choice.error is not None:
                failures.append(SequenceFailure(state.seq, choice.error))
            # a failed sequence gets a token as well: a plan already sent may count on it
            state.token_ids.append(choice.token_id)
            if choice.error is None:
                token = SampledToken(state.seq, choice.token_id, choice.logprob, choice.top)
                tokens.append(token)
        if choices:
            self._pipeline.announce([choice.token_id for choice in choices])
        return tokens, failures

    def _allowed(self, state: SequenceState) -> bytes | None:
        """What the sequence's grammar allows next. Raises `RequestFailed`."""
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
