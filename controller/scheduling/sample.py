"""What the scheduler knows of one sample while it lives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from phalanx.controller.kvcache.prefix import DigestChain
from phalanx.protos.errors import PhalanxError
from phalanx.protos.steps import NewSequence, PromptLogprobs, SampledToken

from .request import FinishReason, Request, TokenEvent


class State(Enum):
    """Where a sample is. The arrows are drawn in `scheduler.py`."""

    WAITING = "waiting"
    """In the queue."""
    FOLLOWING = "following"
    """Another sample of its request, the leader, is computing their prompt."""
    LOADING = "loading"
    """Blocks of its prompt are on their way back into the KV pool."""
    RUNNING = "running"
    """Holds KV blocks, and the ranks know it as `seq`."""
    LEAVING = "leaving"
    """As running, but it gets no rows: it is about to go on at another replica."""
    ENDED = "ended"


@dataclass(slots=True, eq=False, kw_only=True)
class Sample:
    """One sample and its progress, counted in tokens::

        prompt | output known here | pending: sampled by plans that are not answered yet
               ^ num_prompt        ^ num_known                                         ^ length

        computed by the plans made so far  | remaining
                                           ^ num_computed                              ^ length

    There are no phases: plans compute `remaining` tokens, and the plan that reaches `length`
    makes it one longer, until `length` is `limit`.
    """

    request: Request
    order: int
    """Rank of arrival; lower came earlier."""
    limit: int
    """The `length` at which the sample ends for certain."""
    stop_ids: frozenset[int]
    state: State = State.WAITING
    seq: int = -1
    """Attempt id of the current or last admission."""
    num_computed: int = 0
    """By this attempt."""
    pending: int = 0
    chain: DigestChain | None = None
    """Digests of the known tokens, made at the first attempt to admit."""
    was_admitted: bool = False
    was_announced: bool = False
    """Whether an event has left."""
    preemptions: int = 0
    cached_prompt_tokens: int = 0
    """At the first admission."""
    num_scored: int
    """Prompt tokens whose log-probabilities have left; the first has none."""
    ticket: int = -1
    """Its place in the waiting queue."""
    leader: Sample | None = None
    followers: list[Sample] = field(default_factory=list)
    """Samples of the same request that wait until this one has computed the prompt."""
    load: int | None = None
    """What it waits for, or has waited for: nobody waits twice before an admission."""
    probation: int = 0
    """Tokens that it must yet give alone."""
    fork_of: int | None = None
    """Attempt whose blocks hold the prompt, of use while it still runs."""

    @classmethod
    def of(cls, request: Request, order: int, context: int, eos: Iterable[int]) -> Sample:
        """A sample that has just arrived. context: tokens a sample may have at most."""
        params, num_prompt = request.params, len(request.prompt_token_ids)
        limit = min(context, num_prompt + params.max_tokens) if params.max_tokens else context
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
        return cls(
            request=request,
            order=order,
            limit=limit,
            stop_ids=frozenset(stops),
            # output of an earlier life: the prompt was scored before it
            num_scored=num_prompt if request.output_token_ids else 1,
        )

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        return self.num_prompt + len(self.request.output_token_ids)

    @property
    def length(self) -> int:
        return self.num_known + self.pending

    @property
    def remaining(self) -> int:
        """Tokens to compute now."""
        return self.length - self.num_computed

    @property
    def is_complete(self) -> bool:
        """Every token that the limit allows has been planned; results are all that is missing."""
        return self.length == self.limit

    @property
    def has_prompt(self) -> bool:
        """Its blocks hold all that a fork needs; the last prompt token each sample computes."""
        return self.num_computed >= self.num_prompt - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt tokens must still be scored, and hence computed."""
        request = self.request
        scores = request.params.prompt_logprobs is not None and request.sample_index == 0
        return scores and self.num_scored < self.num_prompt

    def lead(self, followers: list[Sample]) -> None:
        """Compute the prompt for these samples as well."""
        self.followers = followers
        for follower in followers:
            follower.leader, follower.state = self, State.FOLLOWING

    def inherit(self) -> Sample:
        """Lead the other followers of a leader that has ended, as the first of them."""
        heirs = self.leader.followers[1:] if self.leader is not None else []
        self.leader, self.state = None, State.WAITING
        self.lead(heirs)
        return self

    def new_sequence(self) -> NewSequence:
        """The full record for the ranks."""
        request = self.request
        return NewSequence(
            seq=self.seq,
            token_ids=request.prompt_token_ids + request.output_token_ids,
            num_prompt=self.num_prompt,
            num_computed=self.num_computed,
            params=request.params,
            sample_index=request.sample_index,
        )

    def accept(self, token: SampledToken) -> FinishReason | None:
        """Append a token that was pending. Returns why it is the last one, if it is."""
        request = self.request
        # the sampler bans stop ids for the first min_tokens tokens
        may_stop = len(request.output_token_ids) >= request.params.min_tokens
        request.output_token_ids.append(token.token_id)
        self.pending -= 1
        if self.chain is not None:
            self.chain.feed((token.token_id,))
        if may_stop and token.token_id in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_known == self.limit else None

    def take_scores(self, scores: PromptLogprobs | None) -> PromptLogprobs | None:
        """The part of `scores` that has not left before: a re-admitted prompt is scored again."""
        if scores is None or not self.wants_prompt_logprobs:
            return None
        known = max(self.num_scored - scores.start, 0)
        if known >= len(scores.tokens):
            return None
        self.num_scored = scores.start + len(scores.tokens)
        return PromptLogprobs(
            scores.seq, scores.start + known, scores.tokens[known:], scores.top[known:]
        )

    def event(
        self,
        token: SampledToken | None = None,
        finish: FinishReason | None = None,
        *,
        error: PhalanxError | None = None,
        scores: PromptLogprobs | None = None,
    ) -> TokenEvent:
        """News of this sample; `token` has been accepted already."""
        tokens = () if token is None else (token,)
        stopped = token is not None and finish is FinishReason.STOP
        first, self.was_announced = not self.was_announced, True
        return TokenEvent(
            request_id=self.request.request_id,
            sample_index=self.request.sample_index,
            first_index=len(self.request.output_token_ids) - len(tokens),
            tokens=tokens,
            finish=finish,
            stop_token=token.token_id if token is not None and stopped else None,
            error=error,
            cached_prompt_tokens=self.cached_prompt_tokens if first else 0,
            prompt_logprobs=scores,
        )
