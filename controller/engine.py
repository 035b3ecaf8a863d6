"""The engine behind the gRPC front: requests to replicas, token events back to their streams.

Runs on one event loop. Step loops run on threads of their own; they hand over their events once a
step, through `call_soon_threadsafe`. When a replica is lost, its streams move to a live one, or
wait for the next that becomes ready; their readers see a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from phalanx.protos.errors import AlreadyExists, GroupLost, ResourceExhausted, Unavailable
from phalanx.protos.limits import DEFAULT_MAX_QUEUED_REQUESTS
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import DecoderSpec

from .cluster.snapshot import ClusterSnapshot, ReplicaSnapshot
from .door import Door
from .handle import ReplicaHandle
from .kvcache.changes import PrefixUpdate
from .movement.movement import DRAIN_S, DrainReport, KeptMove, Movement
from .quarantine import Quarantine
from .residents import Residents
from .routing.placer import Placement, Placer
from .scheduling.request import FinishReason, TokenEvent
from .stream import Stream
from .tenants import CANARY_TENANT
from .tracing.context import TRACE

HELD_RETRY_S = 2.0
UNREADY_RETRY_S = 5.0


class AsyncEngine:
    """`server.engine.Engine` over replicas. Create and use it on one running event loop."""

    def __init__(
        self,
        model: DecoderSpec,
        replicas: int,
        placer: Placer | None = None,
        *,
        max_held: int = DEFAULT_MAX_QUEUED_REQUESTS,
        prefill: int = 0,
        **movement: Any,
    ) -> None:
        """max_held: requests that wait for a replica to come, at most; more are refused.
        prefill: see `Residents`. movement: see `Movement`."""
        self._model, self._max_held = model, max_held
        self._loop = asyncio.get_running_loop()
        self._slots: list[ReplicaHandle | None] = [None] * replicas
        self._numbers = itertools.count()
        self._live: dict[tuple[str, str], Stream] = {}
        self._homeless: dict[Stream, None] = {}
        self._placer = placer or Placer()
        self._residents = Residents(self._slots, self._placer, prefill)
        self._by_name = self._residents.by_name
        self._movement = Movement(self._residents, self._relocate, **movement)
        self._door = Door()
        self.holding = False
        """Whether requests that find no replica wait for one, as it will soon be there."""
        self._quarantine = Quarantine()
        self.on_serving: Callable[[bool], None] = lambda serving: None
        """Called on the event loop when `serving` may have changed."""
        self.on_replica_lost: Callable[[int, GroupLost], None] = lambda index, error: None
        """Called on the event loop; for whoever starts replicas again."""
        self.condition: Callable[[int, ReplicaSnapshot], ReplicaSnapshot] = lambda index, known: (
            known
        )
        """Adds what that one knows of a slot to its snapshot."""

    # --- replicas ---

    def sink(self, events: Sequence[TokenEvent]) -> None:
        """Events of a step; called on the step loops' threads."""
        self._call(self._deliver, events)

    def prefix_sink(
        self, handle: ReplicaHandle, events: Sequence[TokenEvent], update: PrefixUpdate
    ) -> None:
        """Events of a step after which the replica's cached prefixes are others; as `sink`."""
        self._call(self._take_prefixes, handle, events, update)

    def lost(self, handle: ReplicaHandle, error: GroupLost) -> None:
        """A replica is gone; called on its step loop's thread, after its last events."""
        self._call(self._lose, handle, error)

    async def adopt(self, handle: ReplicaHandle) -> None:
        """Take in a replica whose loop runs, once it has produced a canary token.

        Raises `GroupLost` when it dies over it.
        """
        if handle.replica.lost is not None:  # before anybody listened
            raise handle.replica.lost
        self._slots[handle.index] = handle
        await self._canary(handle)
        handle.proven = True
        self._residents.join(handle)
        self._place_homeless()
        self.on_serving(self.serving)

    async def release(self, index: int) -> asyncio.Future[None] | None:
        """End a slot's replica on purpose, after the step in flight; its streams go on elsewhere,
        or wait for the next replica. Returns when they have left, with what is done when its ranks
        have gone; None: there was no replica."""
        handle = self._slots[index]
        if handle is None:
            return None
        with contextlib.suppress(Unavailable):
            await self.drain(index)
        handle.leaving = True
        self._residents.leave(index)
        self.on_serving(self.serving)
        ending = asyncio.ensure_future(asyncio.to_thread(handle.replica.stop))
        await handle.left.wait()
        return ending

    async def drain(self, index: int, timeout_s: float = DRAIN_S) -> DrainReport:
        """Let a replica take no more requests, and its streams go on elsewhere with their KV
        blocks. Raises `Unavailable`, changing nothing, where there is no other."""
        return await self._movement.drain(index, timeout_s)

    def resize(self, replicas: int) -> None:
        """So many slots there are from now on. Precondition: those that go have no replica."""
        self._slots[replicas:] = [None] * (replicas - len(self._slots))

    @property
    def replicas(self) -> list[ReplicaHandle]:
        """Those that are there, lost ones not yet replaced included."""
        return [handle for handle in self._slots if handle is not None]

    @property
    def serving(self) -> bool:
        """Whether any replica takes requests."""
        return any(handle.serving for handle in self.replicas)

    @property
    def busy(self) -> frozenset[int]:
        """The slots that requests run on."""
        slots = (stream.replica for stream in self._by_name.values())
        return frozenset(slot for slot in slots if slot is not None)

    @property
    def homeless(self) -> int:
        """Requests that have no replica."""
        return len(self._homeless)

    def tick(self, now: float) -> None:
        """End homeless requests whose deadline has passed; to be called now and then."""
        for stream in list(self._homeless):
            if stream.deadline is not None and stream.deadline <= now:
                stream.end(FinishReason.DEADLINE)
        self._place_homeless()
        self._movement.balance()

    # --- requests ---

    async def submit(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tenant: str,
        deadline: float | None,
        known: Mapping[int, Sequence[int]] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[list[TokenEvent]]:
        """See `server.engine.Engine.submit`."""
        if (tenant, request_id) in self._live:
            raise AlreadyExists(f"request_id {request_id!r} is taken by a request that still runs")
        number, now = next(self._numbers), time.monotonic()
        self._quarantine.check(prompt_token_ids, params, now)
        stream = Stream(
            number,
            prompt_token_ids,
            params,
            tenant,
            now,
            deadline,
            request_id=request_id,
            known=known,
            priority=priority,
        )
        stream.trace = TRACE.get()
        handle = self._residents.choose(stream, copies=True)
        if handle is None and not stream.accepted_before:
            self._check_held()
        self._live[tenant, request_id] = stream
        self._door.enter(tenant, stream.samples)
        try:
            if handle is not None and self._residents.decision is not None:
                brought = await self._movement.bring_prefix(stream, self._residents.decision)
                handle = handle if brought and handle.serving else self._residents.choose(stream)
            if handle is None:
                self._leave_homeless(stream)
            elif not stream.finished:
                self._residents.place(stream, handle)
            async with contextlib.aclosing(self._follow(stream)) as batches:
                async for events in batches:
                    yield events
        finally:
            del self._live[tenant, request_id]
            self._door.leave(tenant, stream.left_open, served=False)

    def divert(self, request_id: str, tenant: str, take: Callable[[TokenEvent], None]) -> None:
        """See `server.engine.Engine.divert`."""
        self._live[tenant, request_id].divert(take)

    def check_room(self, tenant: str) -> None:
        """See `server.engine.Engine.check_room`."""
        ready = [handle.replica.places_of(tenant) for handle in self._residents.ready]
        if not ready:
            self._check_held()
        else:
            running, most = map(sum, zip(*ready, strict=True))
            self._door.check(tenant, running, most)

    def stop_sample(self, request_id: str, sample_index: int, tenant: str) -> None:
        """See `server.engine.Engine.stop_sample`."""
        if stream := self._live.get((tenant, request_id)):
            self._abort(stream, sample_index)

    def abort(self, request_id: str, tenant: str) -> bool:
        """See `server.engine.Engine.abort`."""
        stream = self._live.get((tenant, request_id))
        if stream is None:
            return False
        self._abort(stream, None)
        return True

    def snapshot(self) -> ClusterSnapshot:
        """See `server.engine.Engine.snapshot`."""
        replicas = tuple(
            ReplicaSnapshot(replica_id=f"replica-{index}", state="starting")
            if handle is None
            else handle.snapshot(self._model)
            for index, handle in enumerate(self._slots)
        )
        replicas = tuple(itertools.starmap(self.condition, enumerate(replicas)))
        waiting = sum(replica.waiting_requests for replica in replicas)
        return ClusterSnapshot(replicas=replicas, queued_requests=waiting + len(self._homeless))

    def placements(self) -> list[Placement]:
        """Where the latest requests went and why, the oldest first; none with one replica."""
        return self._placer.placements()

    def moves(self) -> list[KeptMove]:
        """The latest hand-overs of requests, the oldest first."""
        return self._movement.moves()

    # --- the inside ---

    def _relocate(self, stream: Stream) -> None:
        """Take a stream from its replica and place it anew, from its tokens."""
        self._residents.detach(stream)
        self._leave_homeless(stream)
        self._place_homeless()

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _check_held(self) -> None:
        """Refuse a request that would have to wait for a replica, unless one is to come soon."""
        if not self.holding:
            raise Unavailable("no replica is ready", UNREADY_RETRY_S)
        if len(self._homeless) >= self._max_held:
            text = f"{len(self._homeless)} requests wait for a replica already"
            raise ResourceExhausted(text, HELD_RETRY_S)

    def _leave_homeless(self, stream: Stream) -> None:
        self._homeless[stream] = None
        if stream.trace is not None:
            stream.trace.homeless()

    def _place_homeless(self) -> None:
        """Find replicas for the streams that have lost theirs, the oldest first."""
        for stream in list(self._homeless):
            if stream.finished:
                del self._homeless[stream]
            elif (handle := self._residents.choose(stream)) is not None:
                del self._homeless[stream]
                self._residents.place(stream, handle)

    def _lose(self, handle: ReplicaHandle, error: GroupLost) -> None:
        slots = self._slots
        if handle.index >= len(slots) or slots[handle.index] is not handle:
            return
        slots[handle.index] = None
        handle.left.set()
        self._placer.index.drop(handle.index)
        self._residents.leave(handle.index)
        lost = [stream for stream in self._by_name.values() if stream.replica == handle.index]
        loss = handle.replica.computing
        for stream in lost:
            del self._by_name[stream.name]
            blamed = not handle.leaving and loss.blames(stream.name)
            if stream.lose(blamed=blamed, crashed=error.crashed, alone=loss.alone):
                self._quarantine.convict(stream, time.monotonic())
            else:
                self._leave_homeless(stream)
        self._place_homeless()
        self.on_serving(self.serving)
        if not handle.leaving:
            self.on_replica_lost(handle.index, error)

    def _abort(self, stream: Stream, sample_index: int | None) -> None:
        handle = None if stream.replica is None else self._slots[stream.replica]
        if handle is None:
            stream.end(FinishReason.ABORT, sample_index)
        else:
            handle.replica.abort(stream.name, sample_index, FinishReason.ABORT)

    async def _follow(self, stream: Stream) -> AsyncGenerator[list[TokenEvent]]:
        """The stream's events; a refusal is raised. Leaves nothing behind, however it ends."""
        admitted, left = False, stream.samples
        try:
            while left:
                events = await stream.take()
                refusal = events[0].error
                if not admitted and refusal is not None:
                    raise refusal
                admitted = True
                left -= sum(event.finish is not None for event in events)
                yield events
        finally:
            if not stream.finished:
                self._abort(stream, None)
            if self._by_name.pop(stream.name, None) is not None:
                self._residents.charge(stream, ended=True)
            self._homeless.pop(stream, None)
            if stream.trace is not None:
                stream.trace.finished()

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            if stream := self._by_name.get(event.request_id):
                stream.push(event)
                self._count(stream, event)
                if stream.finished:
                    del self._by_name[event.request_id]

    def _count(self, stream: Stream, event: TokenEvent) -> None:
        """Learn from an event what the next decisions need."""
        if event.finish in (FinishReason.STOP, FinishReason.LENGTH):
            self._placer.lengths.saw(stream.tenant, event.first_index + len(event.tokens))
        if event.finish is not None and event.error is None and stream.request_id:
            stream.left_open -= 1
            self._door.leave(stream.tenant, 1)
        if stream.is_milestone(event):
            self._residents.charge(stream)
        self._movement.saw_token(stream)

    def _take_prefixes(
        self, handle: ReplicaHandle, events: Sequence[TokenEvent], update: PrefixUpdate
    ) -> None:
        self._deliver(events)
        if not self._placer.index.apply(handle.index, update):
            handle.replica.list_prefixes()

    async def _canary(self, handle: ReplicaHandle) -> None:
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        stream = Stream(next(self._numbers), [0], params, CANARY_TENANT, time.monotonic(), None)
        # a canary proves this replica: it must not move to another one
        stream.stays = True
        self._residents.place(stream, handle)
        tokens = 0
        async for events in self._follow(stream):
            tokens += sum(len(event.tokens) for event in events)
            for event in events:
                if event.error is not None:
                    raise GroupLost(f"{handle.replica_id} gave no canary token: {event.error}")
        if tokens != 1:
            raise GroupLost(f"{handle.replica_id} gave no canary token")
