"""Generation from Python without a server: no Ray, no gRPC, ranks as child processes."""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self

from phalanx.protos.errors import ConfigError, GroupLost, PhalanxError
from phalanx.protos.v1 import serving_pb2

from .cluster.process_fleet import ProcessFleet
from .cluster.sizing import plan_unplaced
from .cluster.snapshot import RankSnapshot
from .completion import Collector, Completion
from .config import DEFAULTS, ClusterConfig
from .handle import ReplicaHandle
from .kvcache.changes import PrefixUpdate
from .messages import Messages, Prompt, chat_request, generate_request
from .model import ServedModel, resolve_model
from .observing import Observer, Silent
from .scheduling.request import FinishReason, Request, TokenEvent
from .scheduling.scheduler import SchedulerStats
from .server.admission import Admission, Admitted
from .server.answer import Answer
from .server.tokens import TokenTexts
from .starting import ReplicaStarter

TENANT = "offline"
QUEUED = 2**31 - 1  # the caller waits for all of its prompts, however many they are
SETTINGS = [
    "tp",
    "dtype",
    "kv_dtype",
    "block_size",
    "kv_tokens",
    "memory_per_rank",
    "max_context",
    "max_tokens_per_step",
    "max_running",
    "max_in_flight",
    "prefix_caching",
    "host_kv_memory",
    "disk_kv_path",
    "disk_kv_memory",
    "weights_cache",
    "weights_cache_bytes",
    "collectives",
    "threads",
    "start_timeout_s",
    "step_timeout_s",
    "silence_timeout_s",
]
"""Fields of `ClusterConfig` that mean something here."""


class Offline:
    """A model on this machine's CPUs. Use it with `with`, or `close` it; from one thread at a time.

    model: as for `phalanx serve`. settings: those fields of `ClusterConfig` that are named in
    `SETTINGS`, with the same meaning and defaults. Raises `ConfigError` for others, and whatever
    `phalanx serve` would end with. Nothing is started again: after a `GroupLost`, make another.
    """

    def __init__(self, model: str, *, observer: Observer | None = None, **settings: Any) -> None:
        """observer: told about every step."""
        self._config = _config(model, settings)
        self._served = resolve_model(model, self._config.max_context, self._config.chat_template)
        plan_unplaced(self._config, self._served)
        self._admission = Admission(self._served, self._config.tool_parser)
        self._texts = TokenTexts(self._served.tokenizer)
        self._events: queue.SimpleQueue[Sequence[TokenEvent] | GroupLost] = queue.SimpleQueue()
        self._numbers = itertools.count()
        starter = ReplicaStarter(
            self._config, self._served, "cpu", self, observer or Silent(), None, _process_fleet
        )
        self._handle = asyncio.run(starter.start(0, 0))
        self._replica = self._handle.replica
        self.dtype = starter.dtype
        """The number format in use."""

    @property
    def model(self) -> ServedModel:
        """What is known of the model: its tokenizer, its spec, its context."""
        return self._served

    @property
    def ranks(self) -> tuple[RankSnapshot, ...]:
        """What each rank holds."""
        return self._handle.snapshot(self._served.spec).ranks

    @property
    def stats(self) -> SchedulerStats:
        """What the scheduler has counted, as of its last step."""
        return self._replica.stats()

    def generate(self, prompts: Prompt | Sequence[Prompt], **params: Any) -> list[Completion]:
        """Continue texts or lists of token ids, all at once; the answers come in their order.

        params: the fields of the messages `SamplingParams` and `RequestOptions`, for all of them; an unknown name is a
        `TypeError`. Raises `InvalidArgument` before anything is computed; what ends a request
        later is raised when the others have ended.
        """
        return self._complete(
            self._admission.generate(generate_request(prompt, "", params))
            for prompt in _listed(prompts)
        )

    def chat(self, conversations: Sequence[Messages], **params: Any) -> list[Completion]:
        """Answer conversations, `{"role", "content"}` each; a text is one user's message."""
        return self._complete(
            self._admission.chat(chat_request(messages, "", params)) for messages in conversations
        )

    def close(self) -> None:
        """End the ranks."""
        self._replica.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- what the step loop says, on its thread ---

    def sink(self, events: Sequence[TokenEvent]) -> None:
        """Events of a step."""
        self._events.put(events)

    def prefix_sink(
        self, handle: ReplicaHandle, events: Sequence[TokenEvent], update: PrefixUpdate
    ) -> None:
        """Events of a step; nobody asks who has cached what."""
        self._events.put(events)

    def lost(self, handle: ReplicaHandle, error: GroupLost) -> None:
        """The ranks are gone."""
        self._events.put(error)

    def _complete(self, requests: Iterable[Admitted]) -> list[Completion]:
        jobs = [self._job(admitted) for admitted in requests]
        if self._replica.lost is not None:
            raise self._replica.lost
        pending = {job.name: job for job in jobs}
        try:
            for job in jobs:
                self._replica.add(job.requests())
            while pending:
                events = self._events.get()
                if isinstance(events, GroupLost):
                    raise events
                for event in events:
                    known = pending.get(event.request_id)
                    if known is not None and known.take(event):
                        del pending[known.name]
        finally:
            for name in pending:
                self._replica.abort(name, None, FinishReason.ABORT)
        return [job.completion() for job in jobs]

    def _job(self, admitted: Admitted) -> _Job:
        name = str(next(self._numbers))

        def stop_sample(index: int) -> None:
            self._replica.abort(name, index, FinishReason.ABORT)

        return _Job(name, admitted, self._texts, stop_sample)


class _Job:
    """One request: its events become the messages that a client would get, and they an answer."""

    def __init__(
        self,
        name: str,
        admitted: Admitted,
        texts: TokenTexts,
        stop_sample: Callable[[int], None],
    ) -> None:
        self.name, self._admitted = name, admitted
        self._answer = Answer(
            texts, admitted.params, admitted.prompt_token_ids, stop_sample, tools=admitted.tools
        )
        self._collector = Collector()
        self._begun = False
        self._error: PhalanxError | None = None

    def requests(self) -> list[Request]:
        """Its samples, for the scheduler."""
        now, seconds = time.monotonic(), self._admitted.deadline_s
        return [
            Request(
                request_id=self.name,
                sample_index=index,
                prompt_token_ids=self._admitted.prompt_token_ids,
                params=self._admitted.params,
                tenant=TENANT,
                arrival=now,
                deadline=None if seconds is None else now + seconds,
                priority=self._admitted.priority,
            )
            for index in range(self._admitted.params.n)
        ]

    def take(self, event: TokenEvent) -> bool:
        """Whether it is over with this event."""
        try:
            self._answer.fold([event])
        except PhalanxError as error:
            self._error = error
            return True
        over = self._answer.over
        if over or not self._begun:
            while message := self._answer.take(serving_pb2.GenerateResponse, self.name):
                self._collector.add(message)
                self._begun = True
        return over

    def completion(self) -> Completion:
        """The whole answer. Raises what ended it, if it was not its end."""
        if self._error is not None:
            raise self._error
        return self._collector.completion()


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, a text or token ids, is as good as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    texts = [prompt for prompt in prompts if not isinstance(prompt, int)]
    if len(texts) == len(prompts):
        return texts
    return [[token for token in prompts if isinstance(token, int)]] if not texts else [*prompts]


def _config(model: str, settings: dict[str, Any]) -> ClusterConfig:
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ConfigError(f"{', '.join(unknown)}: no such setting; allowed: {', '.join(SETTINGS)}")
    running = settings.get("max_running", DEFAULTS["max_running"])
    if isinstance(running, int):  # many at once need no word about the size of a step
        least = max(DEFAULTS["max_tokens_per_step"], running)
        settings = {"max_tokens_per_step": least} | settings
    return ClusterConfig(model=model, device="cpu", max_queued=QUEUED, **settings)


def _process_fleet(config: ClusterConfig, device: Literal["cpu", "cuda"]) -> ProcessFleet:
    return ProcessFleet(
        config.tp,
        collectives=config.collectives,
        threads=config.threads,
        start_timeout_s=config.start_timeout_s,
        step_timeout_s=config.step_timeout_s,
        silence_timeout_s=config.silence_timeout_s,
    )
