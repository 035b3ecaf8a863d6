"""Requests that outlive their calls.

A request with an id of its caller's is a session: a task follows it in the engine, whoever reads.
Its events go to the journal, and from there, once they are durable, to the session's log; every
reader folds that log from its beginning, at its own pace, so that nothing is queued for anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from phalanx.controller.journal.records import Header, Kept
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.errors import (
    AlreadyExists,
    JournalLost,
    NotFound,
    PhalanxError,
    RequestFailed,
)

from .admission import Admitted
from .engine import Engine
from .interceptors import logged_incident
from .tokens import SampleText, TokenTexts

GRACE_S = 30.0

Key = tuple[str, str]


class Journal(Protocol):
    """Where sessions are kept. Its methods belong to one event loop."""

    on_lost: Callable[[JournalLost], None]

    @property
    def durable(self) -> bool:
        """Whether another process can go on from it."""

    @property
    def unfinished(self) -> Sequence[Kept]:
        """Requests of an earlier process, to be read once."""

    def begin(self, header: Header) -> int:
        """A request is accepted; returns the number of its record."""

    def append(
        self,
        number: int,
        events: Sequence[TokenEvent],
        *,
        over: bool,
        then: Callable[[], None],
    ) -> None:
        """Write events, the last ones if it is `over`; `then` is called when they are durable."""

    def forget(self, number: int) -> None:
        """The request was refused."""

    def find(self, tenant: str, request_id: str) -> Kept | None:
        """A finished request that is still kept."""


class Session:
    """One accepted request. What `take` has noted comes to `log` when it is durable."""

    def __init__(self, kept: Kept, texts: TokenTexts) -> None:
        self.header, self.number = kept.header, kept.number
        self.log = kept.events
        self.complete = False
        """Whether the log holds the end of every sample."""
        self.error: PhalanxError | None = None
        """Why its readers get no more; it is no part of the log."""
        self.deadline: float | None = None
        """In seconds of `time.monotonic()`."""
        self.readers: list[Callable[[], None]] = []
        """How each that reads is told of news."""
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        params = kept.header.params
        self.open: dict[int, list[int]] = {index: [] for index in range(params.n)}
        """Tokens of the samples that have not ended, durable or not yet."""
        self._texts: dict[int, SampleText] = {}
        if params.stop:
            self._texts = {
                index: SampleText(
                    texts.stream(params.skip_special_tokens),
                    params.stop,
                    include=params.include_stop,
                    min_tokens=params.min_tokens,
                )
                for index in range(params.n)
            }
        for event in kept.events:
            self._note(event)

    @property
    def key(self) -> Key:
        return self.header.tenant, self.header.request_id

    @property
    def ended(self) -> bool:
        """Whether nothing more will be taken."""
        return not self.open

    @property
    def stops_early(self) -> bool:
        """Whether its text may end a sample before the engine does."""
        return bool(self._texts)

    def take(self, events: Sequence[TokenEvent]) -> tuple[list[TokenEvent], list[int]]:
        """The events that count, and the samples that a stop string has ended in them."""
        taken: list[TokenEvent] = []
        stopped: list[int] = []
        for event in events:
            if event.sample_index not in self.open:
                continue
            if event.cached_prompt_tokens and (self.log or taken):
                # what a later attempt finds in a cache is not what the first one has found
                event = dataclasses.replace(event, cached_prompt_tokens=0)
            if self._note(event):
                stopped.append(event.sample_index)
            taken.append(event)
        return taken, stopped

    def _note(self, event: TokenEvent) -> bool:
        """Keep count of a sample; whether a stop string has ended it."""
        tokens = self.open[event.sample_index]
        if event.tokens and event.first_index != len(tokens):
            raise RequestFailed(f"token {event.first_index} came, {len(tokens)} is due")
        for token in event.tokens:
            tokens.append(token.token_id)
        stopped = bool(self._texts) and self._stops(event)
        if stopped or event.finish is not None:
            del self.open[event.sample_index]
        return stopped and event.finish is None

    def _stops(self, event: TokenEvent) -> bool:
        text = self._texts.get(event.sample_index)
        if text is None:
            return False
        for place, token in enumerate(event.tokens, 1):
            ends = event.stop_token is not None and place == len(event.tokens)
            if ends and not self.header.params.include_stop:
                text.skip()
            else:
                text.push(token.token_id)
            if text.stopped is not None:
                return True
        return False

    def ends(self, finish: FinishReason, error: PhalanxError | None) -> list[TokenEvent]:
        """Last events for all samples that have had none; they are to be taken."""
        return [
            TokenEvent(
                request_id="",
                sample_index=index,
                first_index=len(tokens),
                finish=finish,
                error=error,
            )
            for index, tokens in self.open.items()
        ]

    def release(self, events: Sequence[TokenEvent], complete: bool) -> None:
        """These events are durable."""
        self.log += events
        self.complete = complete
        self.tell()

    def tell(self) -> None:
        """Wake all readers."""
        for wake in self.readers:
            wake()


class Sessions:
    """All sessions of one engine. Belongs to one event loop.

    grace_s: seconds that a session goes on without a reader, before it is ended.
    """

    def __init__(
        self, engine: Engine, journal: Journal, texts: TokenTexts, grace_s: float = GRACE_S
    ) -> None:
        self._engine, self._journal, self._texts = engine, journal, texts
        self._grace_s = grace_s
        self._live: dict[Key, Session] = {}
        self._lost: JournalLost | None = None
        journal.on_lost = self._lose

    def open(self, admitted: Admitted, tenant: str, deadline: float | None) -> Session:
        """Begin a request, or join the one that has this id and the same body.

        deadline: in seconds of `time.monotonic()`. Raises `AlreadyExists` for another body.
        """
        key = (tenant, admitted.request_id)
        session = self._find(key)
        if session is not None:
            if not hmac.compare_digest(session.header.fingerprint, admitted.fingerprint):
                text = f"request_id {admitted.request_id!r} is taken by a request of another body"
                raise AlreadyExists(text)
            return session
        if self._lost is not None:
            raise self._lost
        now = time.time()
        header = Header(
            tenant=tenant,
            request_id=admitted.request_id,
            fingerprint=admitted.fingerprint,
            prompt_token_ids=admitted.prompt_token_ids,
            params=admitted.params,
            arrival=now,
            deadline=None if deadline is None else now + deadline - time.monotonic(),
            tools=admitted.tools,
            priority=admitted.priority,
        )
        session = Session(Kept(self._journal.begin(header), header, []), self._texts)
        self._follow(session, deadline, again=False)
        return session

    def has(self, request_id: str, tenant: str) -> bool:
        """Whether a request of this id was accepted and is still known."""
        return self._find((tenant, request_id)) is not None

    def find(self, request_id: str, tenant: str) -> Session:
        """A session to go on reading. Raises `NotFound`, for foreign ones as well."""
        session = self._find((tenant, request_id))
        if session is None:
            raise NotFound(f"request_id {request_id!r}: no such request is kept")
        return session

    def abort(self, request_id: str, tenant: str) -> None:
        """End the tenant's session of this id at once, if there is one."""
        session = self._live.get((tenant, request_id))
        if session is not None and not session.ended:
            self._abort(session, FinishReason.ABORT)

    def recover(self) -> int:
        """Go on with what an earlier process has left; returns how many requests that are."""
        now, count = time.time(), 0
        for kept in self._journal.unfinished:
            session = Session(kept, self._texts)
            wall = kept.header.deadline
            deadline = None if wall is None else time.monotonic() + wall - now
            self._follow(session, deadline, again=True)
            self._await_readers(session)
            count += 1
        return count

    @contextlib.contextmanager
    def reading(self, session: Session, wake: Callable[[], None]) -> Iterator[None]:
        """While somebody reads the log, whose leaving is noticed; `wake` tells him of news."""
        session.readers.append(wake)
        if session.timer is not None:
            session.timer.cancel()
        try:
            yield
        finally:
            session.readers.remove(wake)
            self._await_readers(session)

    def close(self) -> None:
        """Stop following; what has not ended stays unfinished in the journal."""
        for session in self._live.values():
            if session.timer is not None:
                session.timer.cancel()
            if session.task is not None:
                session.task.cancel()
        self._live.clear()

    # --- the inside ---

    def _find(self, key: Key) -> Session | None:
        if session := self._live.get(key):
            return session
        kept = self._journal.find(*key)
        if kept is None:
            return None
        session = Session(kept, self._texts)
        session.open, session.complete = {}, True
        return session

    def _follow(self, session: Session, deadline: float | None, *, again: bool) -> None:
        self._live[session.key] = session
        session.deadline = deadline
        session.task = asyncio.create_task(self._run(session, deadline, again))

    async def _run(self, session: Session, deadline: float | None, again: bool) -> None:
        """Take in what the engine says until all samples have ended."""
        header = session.header
        more = {"known": {index: tuple(ids) for index, ids in session.open.items()}}
        events = self._engine.submit(
            request_id=header.request_id,
            prompt_token_ids=header.prompt_token_ids,
            params=header.params,
            tenant=header.tenant,
            deadline=deadline,
            priority=header.priority,
            **(more if again else {}),
        )
        begun, diverted = again, False
        try:
            async with contextlib.aclosing(events):  # type: ignore[type-var]
                async for batch in events:
                    begun = True
                    self._take(session, batch)
                    if session.ended:
                        return
                    if not (diverted or session.stops_early):
                        diverted = True
                        take = functools.partial(self._take_one, session)
                        self._engine.divert(header.request_id, header.tenant, take)
            raise RequestFailed("the engine ended the request early")
        except Exception as error:  # noqa: BLE001  it ends this request, and no other
            if not isinstance(error, PhalanxError):
                error = RequestFailed(logged_incident("a session", error))
            if begun:
                self._take(session, session.ends(FinishReason.ERROR, error))
            else:
                self._refuse(session, error)

    def _take_one(self, session: Session, event: TokenEvent) -> None:
        self._take(session, (event,))

    def _take(self, session: Session, batch: Sequence[TokenEvent]) -> None:
        events, stopped = session.take(batch)
        for index in stopped:
            if not session.ended:
                self._engine.stop_sample(session.header.request_id, index, session.header.tenant)
        if not events:
            return
        over = session.ended

        def then() -> None:
            session.release(events, over)
            if over:
                self._drop(session)

        self._journal.append(session.number, events, over=over, then=then)

    def _refuse(self, session: Session, error: PhalanxError) -> None:
        """It was never accepted: its id is free at once."""
        session.error = error
        session.open = {}
        self._journal.forget(session.number)
        self._drop(session)
        session.tell()

    def _await_readers(self, session: Session) -> None:
        if not session.readers and not session.ended and self._live.get(session.key) is session:
            loop = asyncio.get_running_loop()
            wait = self._grace_s
            if session.deadline is not None:
                wait = min(wait, max(session.deadline - time.monotonic(), 0.0))
            session.timer = loop.call_later(wait, self._expire, session)

    def _expire(self, session: Session) -> None:
        """Nobody came back, or not in time."""
        if not session.readers and not session.ended:
            late = session.deadline is not None and time.monotonic() >= session.deadline
            self._abort(session, FinishReason.DEADLINE if late else FinishReason.ABORT)

    def _abort(self, session: Session, reason: FinishReason) -> None:
        self._take(session, session.ends(reason, None))
        if session.task is not None:
            session.task.cancel()

    def _lose(self, error: JournalLost) -> None:
        """Nothing more may be sent: readers are told, and the engine is relieved."""
        self._lost = error
        for session in self._live.values():
            session.error = error
            session.tell()
        self.close()

    def _drop(self, session: Session) -> None:
        if self._live.get(session.key) is session:
            del self._live[session.key]
