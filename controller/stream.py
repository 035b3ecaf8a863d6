"""One accepted request, with all that is needed to go on with it on any replica."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from phalanx.protos.errors import PhalanxError
from phalanx.protos.sampling import SamplingParams

from .bell import Bell
from .routing.lengths import expected_left
from .routing.router import Work
from .scheduling.request import FinishReason, Request, TokenEvent
from .tracing.context import RequestTrace

CLEARED_AFTER_TOKENS = 8
CHARGED_EVERY_TOKENS = 16
SUSPECT_AFTER_LOSSES = 2
"""Of groups that were killed or cut off; of those that crashed, one is enough."""
SET_ASIDE_AFTER_LOSSES = 3
"""The last of them alone. Where the group crashed, it need not have been lost so often."""
PROBATION_TOKENS = 2


class Stream:
    """What has come for a request and was not yet fetched, and the tokens so far.

    Generation is a pure function of prompt, parameters, seed and the tokens so far. `requests`
    therefore makes a continuation that any replica can run, with the very tokens that the lost
    one would have given.
    """

    def __init__(
        self,
        number: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tenant: str,
        arrival: float,
        deadline: float | None,
        *,
        request_id: str = "",
        known: Mapping[int, Sequence[int]] | None = None,
        priority: int = 0,
    ) -> None:
        """request_id: the caller's name for it, if it has one. known: the samples still to be
        finished with their tokens so far, of a request that was accepted in an earlier life."""
        self._number, self._attempt = number, 0
        self.prompt_token_ids, self._params, self.tenant = list(prompt_token_ids), params, tenant
        self._priority = priority
        self._arrival, self.deadline, self.request_id = arrival, deadline, request_id
        samples = dict.fromkeys(range(params.n), ()) if known is None else known
        self._outputs = {index: list(tokens) for index, tokens in samples.items()}
        self.accepted_before = known is not None
        self._events: list[TokenEvent] = []
        self._news = Bell()
        self._diverted: Callable[[TokenEvent], None] | None = None
        self._failure: Exception | None = None
        self.samples = self.left_open = len(self._outputs)
        """How many there are; how many of them the door counts."""
        self.replica: int | None = None
        """Where it runs; None while it has no replica."""
        self.handed_over = False
        """Whether a hand-over to a decode replica was begun."""
        self.losses = self.crashes = 0
        """Groups of ranks that died while they computed it, since it was last seen to be harmless;
        those that were neither killed nor cut off."""
        self.stays = False
        """Whether it ends with its replica."""
        self._since_placed = 0
        self.uncached_tokens = 0
        """Tokens that the replica has to compute before the next one comes, as far as is known; to
        be set when it is placed."""
        self.charged = Work()
        """What its replica was charged for it."""
        self.trace: RequestTrace | None = None

    @property
    def probation(self) -> int:
        """Tokens that it must give alone, as it may be what its replicas died of; more of them each
        time, for those who die later."""
        if not self.crashes and self.losses < SUSPECT_AFTER_LOSSES:
            return 0
        return min(PROBATION_TOKENS << (self.losses - 1), CLEARED_AFTER_TOKENS)

    @property
    def name(self) -> str:
        """The id that replicas know it by; another one for each attempt, so that late events of
        a lost replica are nobody's."""
        return f"{self._number}.{self._attempt}"

    @property
    def asked(self) -> tuple[Sequence[int], SamplingParams]:
        """Prompt and parameters."""
        return self.prompt_token_ids, self._params

    @property
    def finished(self) -> bool:
        """Whether every sample has had its last event."""
        return not self._outputs

    @property
    def started(self) -> bool:
        """Whether it was ever given to a replica."""
        return self._attempt > 0

    @property
    def open_samples(self) -> int:
        """Samples that have not had their last event."""
        return len(self._outputs)

    @property
    def has_tokens(self) -> bool:
        """Whether every open sample has a token."""
        return all(self._outputs.values())

    @property
    def known_tokens(self) -> int:
        """Tokens that a replica must hold before it can go on: the prompt and the longest output."""
        return len(self.prompt_token_ids) + max(map(len, self._outputs.values()), default=0)

    def expected_output(self, usual: float) -> int:
        """Tokens that the open samples are expected to generate yet, where `usual` is the length
        of this tenant's answers."""
        allowed = self._params.max_tokens
        return sum(expected_left(usual, len(have), allowed) for have in self._outputs.values())

    def work(self, usual: float) -> Work:
        """Its part of what its replica has to do."""
        if self.replica is None or not self._outputs:
            return Work()
        left, have = self.expected_output(usual), sum(map(len, self._outputs.values()))
        return Work(
            queue_tokens=self.uncached_tokens,
            streams=len(self._outputs),
            output_tokens=left,
            kv_tokens=len(self.prompt_token_ids) + have + left,
            prompts=int(self.uncached_tokens > 0),
        )

    @property
    def reads_cache(self) -> bool:
        """Whether cached blocks spare it anything: scored prompts are computed in any case."""
        return self._params.prompt_logprobs is None

    def requests(self) -> list[Request]:
        """The open samples, from where they stand, as a new attempt."""
        self._attempt += 1
        self.handed_over = False
        self._since_placed = 0
        return [
            Request(
                request_id=self.name,
                sample_index=index,
                prompt_token_ids=self.prompt_token_ids,
                params=self._params,
                tenant=self.tenant,
                arrival=self._arrival,
                deadline=self.deadline,
                priority=self._priority,
                output_token_ids=list(tokens),
                probation=self.probation,
                trace=self.trace,
            )
            for index, tokens in self._outputs.items()
        ]

    def is_milestone(self, event: TokenEvent) -> bool:
        """Whether what it asks of its replica is to be looked at again after this event: with its
        first token there, its end, and now and then, as a token more changes little."""
        before = self._since_placed - len(event.tokens)
        steps = self._since_placed // CHARGED_EVERY_TOKENS - before // CHARGED_EVERY_TOKENS
        return event.finish is not None or before <= 0 or steps > 0

    def push(self, event: TokenEvent) -> None:
        """An event of the current attempt came."""
        tokens = self._outputs.get(event.sample_index)
        if tokens is None:
            return
        if event.tokens:
            for token in event.tokens:
                tokens.append(token.token_id)
            self._since_placed += len(event.tokens)
            self.uncached_tokens = 0
            if self.trace is not None:
                self.trace.got_tokens(len(event.tokens))
        if self._since_placed >= CLEARED_AFTER_TOKENS:
            self.losses = self.crashes = 0
        if event.finish is not None:
            del self._outputs[event.sample_index]
        if self._diverted is not None and event.finish is None and not self._events:
            try:
                return self._diverted(event)
            except Exception as error:  # noqa: BLE001  it ends this stream, and no other
                self._failure, self._diverted = error, None
        else:
            self._events.append(event)
        self._news.ring()

    def lose(self, *, blamed: bool, crashed: bool = False, alone: bool = False) -> bool:
        """Its replica is gone; blamed: while it computed this; crashed: by itself; alone: while it
        computed nothing else. Returns whether it was this that the ranks died of."""
        self.replica, self.charged = None, Work()
        self.losses += blamed
        self.crashes += blamed and crashed
        if self.trace is not None:
            self.trace.lost()
        often = self.losses >= SET_ASIDE_AFTER_LOSSES
        return self.stays or (blamed and alone and (crashed or often))

    def end(
        self,
        finish: FinishReason,
        sample_index: int | None = None,
        error: PhalanxError | None = None,
    ) -> None:
        """End the open samples, or one of them, from here rather than from a replica."""
        for index, tokens in list(self._outputs.items()):
            if sample_index in (None, index):
                self.push(
                    TokenEvent(
                        request_id=self.name,
                        sample_index=index,
                        first_index=len(tokens),
                        finish=finish,
                        error=error,
                    )
                )

    def divert(self, take: Callable[[TokenEvent], None]) -> None:
        """Let `take` have events at once, but for those that end a sample and what comes while one
        of these waits to be fetched."""
        self._diverted = take

    async def take(self) -> list[TokenEvent]:
        """All that came since the last call, at least one event. Raises what the function that events
        are diverted to has raised."""
        await self._news.wait()
        if self._failure is not None:
            raise self._failure
        events, self._events = self._events, []
        return events
