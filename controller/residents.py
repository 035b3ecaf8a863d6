"""Which stream runs on which replica, and what each replica has been given to do for that."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from phalanx.protos.errors import PhalanxError

from .handle import ReplicaHandle
from .routing.loads import Loads
from .routing.placer import Placer
from .routing.router import Decision, Request, Work
from .scheduling.outline import Standing
from .scheduling.request import FinishReason
from .stream import Stream


class Residents:
    """The streams that have a replica. Belongs to one event loop.

    With prefill replicas (the first `prefill` ones) new requests go to those, and streams that have
    begun to the others; where either kind is missing, the other takes both.
    """

    def __init__(
        self, slots: Sequence[ReplicaHandle | None], placer: Placer, prefill: int = 0
    ) -> None:
        """slots: the replicas as they come and go. placer: of new requests."""
        self._slots, self._placer, self._prefill = slots, placer, prefill
        self._entry, self._decode = placer.loads, Loads()
        self.by_name: dict[str, Stream] = {}
        """By the name of the current attempt."""
        self.decision: Decision | None = None
        """The one that was made last, if there was anything to decide."""

    @property
    def ready(self) -> list[ReplicaHandle]:
        """The replicas that take requests."""
        return [handle for handle in self._slots if handle is not None and handle.serving]

    def handle(self, index: int | None) -> ReplicaHandle | None:
        """The replica in a slot, if it takes requests."""
        there = index is not None and index < len(self._slots)
        handle = self._slots[index] if index is not None and there else None
        return handle if handle is not None and handle.serving else None

    def of(self, index: int) -> list[Stream]:
        """The streams of a replica, the oldest first."""
        return [stream for stream in self.by_name.values() if stream.replica == index]

    # --- which replicas take what ---

    def decodes(self, index: int) -> bool:
        """Whether a replica is there for streams that have begun."""
        return 0 < self._prefill <= index

    def begins(self, index: int) -> bool:
        """Whether a replica's streams should go on elsewhere once they have begun."""
        return not self.decodes(index) and len(self._decode) > 0

    @property
    def begun(self) -> Loads:
        """The replicas that streams which have begun may go to."""
        return self._decode if len(self._decode) else self._entry

    def join(self, handle: ReplicaHandle) -> None:
        """A replica is ready."""
        self._join(self._decode if self.decodes(handle.index) else self._entry, handle)
        self._open_entry()

    def leave(self, index: int) -> None:
        """A replica takes nothing more."""
        self._entry.leave(index)
        self._decode.leave(index)
        self._open_entry()

    def _open_entry(self) -> None:
        """Decode replicas take new requests while there is no other, and only then."""
        begins = any(not self.decodes(handle.index) for handle in self.ready)
        for handle in self.ready:
            if self.decodes(handle.index) and begins:
                self._entry.leave(handle.index)
            elif self.decodes(handle.index) and not self._entry.has(handle.index):
                self._join(self._entry, handle)

    def _join(self, loads: Loads, handle: ReplicaHandle) -> None:
        loads.join(handle.index, handle.places, handle.room, handle.copied_bytes)
        for stream in self.of(handle.index):
            loads.charge(handle.index, Work(), stream.charged)

    def copies_take(self, bytes_per_s: float) -> None:
        """Prefixes can be copied from replica to replica, at this speed."""
        self._entry.copy_bytes_per_s = bytes_per_s

    # --- streams ---

    def choose(self, stream: Stream, *, copies: bool = False) -> ReplicaHandle | None:
        """The live replica that is predicted to give the stream its next token soonest. copies:
        its prefix may come from another replica."""
        loads = self._placer.loads
        while len(loads):
            index = self._pick(stream, copies)
            handle = self._slots[index]
            if handle is not None and handle.serving:
                return handle
            loads.leave(index)  # its loop has ended; the news of that is on the way
        return None

    def _pick(self, stream: Stream, copies: bool) -> int:
        """The replica for a stream by what is known on this thread."""
        loads, self.decision = self._placer.loads, None
        if len(loads) == 1:
            stream.uncached_tokens = stream.known_tokens
            return loads.only
        usual = self._placer.lengths.usual(stream.tenant)
        output = stream.expected_output(usual)
        naming = next(handle for handle in self._slots if handle is not None).naming
        decision = self._placer.choose(
            stream.tenant,
            stream.request_id,
            stream.prompt_token_ids,
            Request(stream.known_tokens, stream.open_samples, output),
            naming,
            reads_cache=stream.reads_cache,
            copies=copies,
        )
        stream.uncached_tokens = decision.uncached_tokens
        self.decision = decision
        return decision.replica

    def place(self, stream: Stream, handle: ReplicaHandle) -> None:
        """Hand the stream's open samples to a replica, from where they stand."""
        readmitted = stream.started or stream.accepted_before
        group = stream.requests()
        if stream.trace is not None:
            stream.trace.placed(handle.replica_id, stream.uncached_tokens)
        stream.replica = handle.index
        self.by_name[stream.name] = stream
        self.charge(stream)
        handle.replica.add(group, readmitted=readmitted)

    def detach(self, stream: Stream) -> None:
        """Take a stream from its replica, which forgets it."""
        del self.by_name[stream.name]
        self.charge(stream, ended=True)
        if stream.replica is not None and (handle := self._slots[stream.replica]) is not None:
            handle.replica.abort(stream.name, None, FinishReason.ABORT)
        stream.replica = None

    def pass_on(
        self,
        stream: Stream,
        target: ReplicaHandle,
        transfer: int,
        standings: Mapping[int, Standing],
    ) -> asyncio.Future[None]:
        """Make the target the stream's replica, from a transfer; done when it has adopted it, or
        begun to compute it anew, with the error that made it so."""
        self.detach(stream)
        group = stream.requests()
        stream.replica, stream.uncached_tokens = target.index, 0
        if stream.trace is not None:
            stream.trace.placed(target.replica_id, 0)
        self.by_name[stream.name] = stream
        self.charge(stream)
        name = stream.name

        async def adopt() -> None:
            asked = target.replica.transfers.adopt(transfer, group, standings)
            try:
                await asyncio.wrap_future(asked)
            except PhalanxError:
                if stream.name == name and stream.replica == target.index and not stream.finished:
                    target.replica.add(group, readmitted=True)
                raise

        return asyncio.ensure_future(adopt())

    def charge(self, stream: Stream, *, ended: bool = False) -> None:
        """Write down what the stream asks of its replica now."""
        index = stream.replica
        if index is None:
            return
        pools = (self._entry, self._decode) if self.decodes(index) else (self._entry,)
        work = Work() if ended else stream.work(self._placer.lengths.usual(stream.tenant))
        if work != stream.charged:
            for loads in pools:
                loads.charge(index, stream.charged, work)
            stream.charged = work
        if (handle := self._slots[index]) is not None:
            for loads in pools:
                loads.measured(index, handle.pace)
