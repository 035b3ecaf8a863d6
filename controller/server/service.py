"""The inference service: messages in, tokens to and from the engine, messages out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from phalanx.controller.journal.memory import MemoryJournal
from phalanx.controller.logs import REQUEST_ID
from phalanx.controller.model import ServedModel
from phalanx.controller.tracing.context import PARENT, TRACE, Tracing
from phalanx.protos.errors import (
    InvalidArgument,
    NotFound,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.protos.limits import MAX_STALL_S
from phalanx.protos.v1 import serving_pb2, serving_pb2_grpc

from .admission import Admission, Admitted
from .answer import Answer, Received, Response
from .books import Call, Reader, RefusalLog
from .convert import cluster_state, move_message, placement, unknown_fields
from .engine import Engine, Observer
from .following import LogReader, read_events, read_log, write_answer
from .listeners import Listener
from .rights import DEFAULT_TENANT
from .sessions import GRACE_S, Journal, Session, Sessions
from .tokens import TokenTexts

INLINE_BYTES = 4096
THREADS = 2
DRAINED_RETRY_S = 2.0
"""For another server to be found, or this one to be started again."""

Value = TypeVar("Value")


def _anyone(context: Any) -> str:
    return DEFAULT_TENANT


class InferenceService(serving_pb2_grpc.InferenceServiceServicer):
    """Serves one model. Belongs to one event loop; errors are raised as `PhalanxError`.

    dtype: the number format in use, for `GetModelInfo`. Raises `ModelError` for a tokenizer
    whose tokens cannot be turned into text one by one, or a broken chat template.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        observer: Observer,
        *,
        dtype: str,
        max_stall_s: float = MAX_STALL_S,
        journal: Journal | None = None,
        grace_s: float = GRACE_S,
        tool_parser: str = "auto",
        tracing: Tracing | None = None,
    ) -> None:
        """journal: where requests with ids of their callers' are kept; None: in memory. grace_s:
        seconds that such a request outlives its call. tool_parser: a
        format of `tools.formats`; "auto": the template's. tracing: who traces requests."""
        self._engine, self._model, self._observer = engine, model, observer
        self._dtype, self._max_stall_s, self._tracing = dtype, max_stall_s, tracing
        self._texts = TokenTexts(model.tokenizer)
        self._sessions = Sessions(engine, journal or MemoryJournal(), self._texts, grace_s)
        self._admission = Admission(model, tool_parser)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._answers: set[Answer] = set()
        self._refusals = RefusalLog()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.on_drain: list[Callable[[], None]] = []
        """Called when new requests begin to be refused."""
        self.identify: Callable[[Any], str] = _anyone
        """The tenant behind a call's context; the host sets it."""
        self.listeners: list[Listener] = []
        """All that this server listens on; whoever starts one adds it."""

    @property
    def engine(self) -> Engine:
        """Where tokens come from."""
        return self._engine

    @property
    def model(self) -> ServedModel:
        """The served model."""
        return self._model

    @property
    def dtype(self) -> str:
        """The number format in use."""
        return self._dtype

    @property
    def model_name(self) -> str:
        """What the served model is called."""
        return self._model.name

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    # --- streams ---

    def _call(self, method: str, reader: Reader, tenant: str, *, outlived: bool = False) -> Call:
        refusals = self._refusals
        return Call(method, self._observer, reader, tenant, refusals=refusals, outlived=outlived)

    async def Generate(self, request: serving_pb2.GenerateRequest, context: Any) -> None:
        """Continue a prompt."""
        call = self._call("Generate", context, self.identify(context), outlived=True)
        await self._stream(call, request, self._admission.generate, serving_pb2.GenerateResponse)

    async def Chat(self, request: serving_pb2.ChatRequest, context: Any) -> None:
        """Answer a conversation."""
        call = self._call("Chat", context, self.identify(context), outlived=True)
        await self._stream(call, request, self._admission.chat, serving_pb2.ChatResponse)

    async def Resume(self, request: serving_pb2.ResumeRequest, context: Any) -> None:
        """Go on reading a request."""
        call = self._call("Resume", context, self.identify(context))
        # what was accepted may be read to its end while the server drains
        async with self._booked(call):
            self._admission.resume(request)
            REQUEST_ID.set(request.request_id)
            session = self._sessions.find(request.request_id, call.tenant)
            if len(request.next_index) > session.header.params.n:
                text = f"{len(request.next_index)} entries, the request has "
                text += f"{session.header.params.n} samples"
                raise InvalidArgument.of("next_index", text)
            received = Received(tuple(request.next_index), request.next_prompt_index)
            await self._follow(session, call, serving_pb2.ResumeResponse, received)

    def recover(self) -> int:
        """Go on with the requests that the journal has; returns how many there are."""
        return self._sessions.recover()

    async def generate(
        self, request: serving_pb2.GenerateRequest, reader: Reader, tenant: str
    ) -> None:
        """Write the `GenerateResponse`s of a request to `reader`. Cancelling this frees all that
        the request holds, at once."""
        call = self._call("Generate", reader, tenant)
        await self._stream(call, request, self._admission.generate, serving_pb2.GenerateResponse)

    async def chat(self, request: serving_pb2.ChatRequest, reader: Reader, tenant: str) -> None:
        """The same for a conversation and its `ChatResponse`s."""
        call = self._call("Chat", reader, tenant)
        await self._stream(call, request, self._admission.chat, serving_pb2.ChatResponse)

    async def _stream(
        self, call: Call, request: Any, admit: Callable[[Any], Admitted], kind: type[Response]
    ) -> None:
        """One request from its arrival to its end."""
        async with self._booked(call):
            self._check_room(call, request.request_id)
            admitted = await self._run(request, admit)
            if self._draining:  # since it came
                self._check_room(call, request.request_id)
            kept = call.outlived and bool(admitted.fingerprint)
            call.admitted(len(admitted.prompt_token_ids))
            REQUEST_ID.set(admitted.request_id)
            if (trace := TRACE.get()) is not None:
                trace.admitted(admitted.request_id, call.prompt_tokens)
            call.hurry(admitted.deadline_s)
            if kept:
                session = self._sessions.open(admitted, call.tenant, call.deadline)
                await self._follow(session, call, kind, Received(), admitted.stream_interval_s)
            else:
                await self._answer(admitted, call, kind)

    @contextlib.asynccontextmanager
    async def _booked(self, call: Call) -> AsyncIterator[None]:
        """A call's entry in the books, however it ends."""
        trace = None if self._tracing is None else self._tracing.begin(call.method, PARENT.get())
        TRACE.set(trace)
        REQUEST_ID.set("")
        try:
            yield
        except PhalanxError as error:
            call.outcome = error.status.lower()
            raise
        except asyncio.CancelledError:
            call.outcome = "deadline_exceeded" if call.late else "cancelled"
            raise
        finally:
            call.end()
            TRACE.set(None)
            if trace is not None:
                trace.end(call.outcome, call.new_tokens)

    def _check_room(self, call: Call, request_id: str) -> None:
        """Refuse new work where there is no room for it, before anything is done for it. To join a
        request that was accepted is no new work."""
        try:
            if self._draining:
                raise Unavailable("the server is shutting down", DRAINED_RETRY_S)
            self._engine.check_room(call.tenant)
        except (ResourceExhausted, Unavailable):
            joins = call.outlived and bool(request_id)
            if not (joins and self._sessions.has(request_id, call.tenant)):
                raise

    async def _answer(self, admitted: Admitted, call: Call, kind: type[Response]) -> None:
        """A request that lives as long as its call."""
        tenant = call.tenant
        answer = Answer(
            self._texts,
            admitted.params,
            admitted.prompt_token_ids,
            lambda index: self._engine.stop_sample(admitted.request_id, index, tenant),
            tools=admitted.tools,
        )
        events = self._engine.submit(
            request_id=admitted.request_id,
            prompt_token_ids=admitted.prompt_token_ids,
            params=admitted.params,
            tenant=tenant,
            deadline=call.deadline,
            priority=admitted.priority,
        )
        # its end frees the request in the engine at once, whatever ended it here
        with self._open(answer, call):
            reading = asyncio.create_task(read_events(events, answer))
            try:
                await write_answer(
                    answer,
                    call,
                    kind,
                    admitted.request_id,
                    self._max_stall_s,
                    interval_s=admitted.stream_interval_s,
                )
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _follow(
        self,
        session: Session,
        call: Call,
        kind: type[Response],
        received: Received,
        interval_s: float = 0.0,
    ) -> None:
        """A request that outlives its call."""
        header = session.header
        answer = Answer(
            self._texts,
            header.params,
            header.prompt_token_ids,
            lambda index: None,
            received,
            header.tools,
        )
        more = functools.partial(read_log, LogReader(session), answer)

        def wake() -> None:
            answer.news.ring(urgent=session.complete or session.error is not None)

        with self._sessions.reading(session, wake), self._open(answer, call):
            await write_answer(
                answer, call, kind, header.request_id, self._max_stall_s, more, interval_s
            )

    @contextlib.contextmanager
    def _open(self, answer: Answer, call: Call) -> Iterator[None]:
        """Around what writes an answer; raises what it ended of."""
        call.answer = answer
        self._answers.add(answer)
        self._idle.clear()
        try:
            yield
        finally:
            self._answers.discard(answer)
            if not self._answers:
                self._idle.set()
        if answer.error is not None:
            raise answer.error
        call.outcome = answer.outcome

    # --- single answers ---

    async def Tokenize(
        self, request: serving_pb2.TokenizeRequest, context: Any
    ) -> serving_pb2.TokenizeResponse:
        """The tokens of a text."""
        ids = await self._run(request, self._admission.tokenize)
        return serving_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: serving_pb2.DetokenizeRequest, context: Any
    ) -> serving_pb2.DetokenizeResponse:
        """The text of tokens."""
        text = await self._run(request, self._admission.detokenize)
        return serving_pb2.DetokenizeResponse(text=text)

    async def Abort(
        self, request: serving_pb2.AbortRequest, context: Any
    ) -> serving_pb2.AbortResponse:
        """End the caller's own request."""
        request_id, tenant = self._admission.abort(request), self.identify(context)
        if not self._engine.abort(request_id, tenant):
            raise NotFound(f"request_id {request_id!r}: no such request is running")
        self._sessions.abort(request_id, tenant)
        return serving_pb2.AbortResponse()

    async def GetModelInfo(
        self, request: serving_pb2.GetModelInfoRequest, context: Any
    ) -> serving_pb2.GetModelInfoResponse:
        """What is served."""
        _refuse_unknown(request)
        model = self._model
        return serving_pb2.GetModelInfoResponse(
            name=model.name,
            family=model.spec.family,
            vocab_size=model.spec.vocab_size,
            max_context=model.max_context,
            dtype=self._dtype,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=self._admission.has_chat_template,
            server_version=importlib.metadata.version("phalanx"),
            tool_parser=self._admission.tool_parser,
        )

    async def GetClusterState(
        self, request: serving_pb2.GetClusterStateRequest, context: Any
    ) -> serving_pb2.GetClusterStateResponse:
        """The replicas as of the last step."""
        _refuse_unknown(request)
        state = cluster_state(self._engine.snapshot())
        for item in self.listeners:
            state.listeners.add(
                address=item.address, protocol=item.protocol, tls=item.tls, auth=item.auth
            )
        return state

    async def ExplainPlacement(
        self, request: serving_pb2.ExplainPlacementRequest, context: Any
    ) -> serving_pb2.ExplainPlacementResponse:
        """Why the caller's request went where it went."""
        request_id, tenant = self._admission.explain(request), self.identify(context)
        found = [
            placement(item.decision)
            for item in self._engine.placements()
            if (item.tenant, item.request_id) == (tenant, request_id)
        ]
        moves = [
            move_message(item.move)
            for item in self._engine.moves()
            if (item.tenant, item.request_id) == (tenant, request_id)
        ]
        if not found and not moves:
            raise NotFound(f"request_id {request_id!r}: no decision of yours is kept under this id")
        return serving_pb2.ExplainPlacementResponse(placements=found, moves=moves)

    async def _run(self, request: Any, work: Callable[[Any], Value]) -> Value:
        """Large requests are tokenised on a thread, so that streams go on meanwhile."""
        if request.ByteSize() <= INLINE_BYTES:
            return work(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, work, request)

    # --- the end ---

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, wait for running ones, end those that outlast `grace_s` seconds."""
        if not self._draining:
            self._draining = True
            for tell in self.on_drain:
                tell()
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for answer in list(self._answers):
                answer.fail(Unavailable("the server is shutting down", DRAINED_RETRY_S))

    def close(self) -> None:
        """Release the threads. What outlives its call waits in the journal for the next process."""
        self._sessions.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _refuse_unknown(request: Any) -> None:
    if violations := unknown_fields(request):
        raise InvalidArgument(violations)
