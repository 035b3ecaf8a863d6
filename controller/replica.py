"""The step loop of one replica: schedule -> execute -> update.

One thread owns the scheduler and the fleet; everybody else leaves commands and gets events. Up
to `max_in_flight` plans are with the ranks at a time, so that they find the next plan waiting
when they finish one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from phalanx.protos.errors import GroupLost, PhalanxError
from phalanx.protos.steps import StepPlan

from .cluster.fleet import Fleet
from .kvcache.changes import PrefixUpdate
from .movement.transfers import Transfers
from .observing import Observer, Silent, StepTimes
from .scheduling.probation import Computing
from .scheduling.request import FinishReason, Request, TokenEvent
from .scheduling.sample import Sample
from .scheduling.scheduler import Scheduler, SchedulerStats

IDLE_WAIT_S = 0.5
ARRIVAL_WAIT_S = 0.002
"""Between two looks at ranks that are idle but for the blocks that they take in."""
MOVES_WAIT_S = 0.002
"""For ranks' words on moves, where no step is under way; a command waits for as long."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _InFlight:
    sent: float
    schedule_s: float
    rows: int
    tokens: int


Sink = Callable[[Sequence[TokenEvent]], None]
PrefixSink = Callable[[Sequence[TokenEvent], PrefixUpdate], None]

TraceStep = Callable[[StepPlan, Iterable[Sample]], StepPlan]
"""Writes into a plan whose spans the ranks tell of it under."""

_Command = Callable[[], Sequence[TokenEvent]]


class Replica:
    """A scheduler and a started fleet, driven by a thread of their own."""

    def __init__(
        self,
        scheduler: Scheduler,
        fleet: Fleet,
        sink: Sink,
        *,
        max_in_flight: int,
        step_timeout_s: float,
        observer: Observer | None = None,
        on_lost: Callable[[GroupLost], None] = lambda error: None,
        prefix_sink: PrefixSink | None = None,
        trace_step: TraceStep | None = None,
    ) -> None:
        """sink gets every step's events. prefix_sink gets them instead, where cached prefixes came
        or went and the scheduler records that. on_lost is told why the loop has ended: whatever was not
        finished before, and whatever is added later, gets no further events. All are called on
        the loop's thread."""
        self._scheduler, self._fleet, self._sink = scheduler, fleet, sink
        self._max_in_flight, self._step_timeout_s = max_in_flight, step_timeout_s
        self._observer, self._on_lost = observer or Silent(), on_lost
        self._prefix_sink, self._trace_step = prefix_sink, trace_step
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._in_flight: deque[_InFlight] = deque()
        self.transfers = Transfers(scheduler, fleet, self._commands.put)
        """Its side of hand-overs to and from other replicas."""
        self._last_result: float | None = None
        self._stopping = threading.Event()
        self._lost: GroupLost | None = None
        self.computing = Computing()
        """Of what the ranks may have died, once they are lost."""
        self._stats = scheduler.stats()
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the step in flight."""
        self._stopping.set()
        self._commands.put(lambda: ())
        if self._thread.is_alive():
            self._thread.join()

    @property
    def lost(self) -> GroupLost | None:
        """Why the loop has ended, if it has."""
        return self._lost

    def stats(self) -> SchedulerStats:
        """The scheduler's figures as of the last turn of the loop."""
        return self._stats

    def places_of(self, tenant: str) -> tuple[int, int]:
        """See `Scheduler.places_of`."""
        return self._scheduler.places_of(tenant)

    def add(self, group: Sequence[Request], *, readmitted: bool = False) -> None:
        """Queue samples of one request; a refusal comes back as their ERROR events.

        readmitted: they were accepted before, so that a full queue does not refuse them.
        """

        def command() -> Sequence[TokenEvent]:
            try:
                self._scheduler.add(group, readmitted=readmitted)
            except PhalanxError as error:
                return [
                    TokenEvent(
                        request_id=request.request_id,
                        sample_index=request.sample_index,
                        first_index=len(request.output_token_ids),
                        finish=FinishReason.ERROR,
                        error=error,
                    )
                    for request in group
                ]
            return ()

        self._commands.put(command)

    def abort(self, request_id: str, sample_index: int | None, reason: FinishReason) -> None:
        """End a request, or one sample of it."""
        self._commands.put(lambda: self._scheduler.abort(request_id, sample_index, reason))

    def list_prefixes(self) -> None:
        """Let `prefix_sink` get a listing of all cached prefixes soon."""

        def command() -> Sequence[TokenEvent]:
            self._scheduler.list_prefixes()
            return ()

        self._commands.put(command)

    def map_blocks(self, take: Callable[[bytes], None]) -> None:
        """Let `take` get the state of every KV block soon, on the loop's thread; see
        `KVCacheManager.block_map`."""

        def command() -> Sequence[TokenEvent]:
            take(self._scheduler.block_map())
            return ()

        self._commands.put(command)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except GroupLost as error:
            self.computing = self._scheduler.computing
            self._end(error)
        except Exception as error:  # noqa: BLE001  a defect of ours: the streams must still end
            _log.exception("the step loop failed")
            self._end(GroupLost(f"the step loop failed: {type(error).__name__}", crashed=True))
        else:
            self._end(GroupLost("the replica was stopped"))

    def _turn(self) -> None:
        """One turn: commands, plans out, one result in."""
        scheduler = self._scheduler
        idle = not self._in_flight and not scheduler.has_work and not scheduler.awaits_moves
        events = self._take_commands(wait=idle)
        events += self._scheduler.expire(time.monotonic())
        if idle:
            self._fleet.check()
        self._fill()
        if self._in_flight:
            events += self._receive()
        elif scheduler.has_work and not scheduler.awaits_moves:
            self._fleet.check()
            events += self._take_commands(wait=True)
        if scheduler.awaits_moves:
            for _, report in self._fleet.moves(0.0 if self._in_flight else MOVES_WAIT_S):
                scheduler.moved(report, time.monotonic())
        self._stats = self._scheduler.stats()
        self._hand_over(events)
        self.transfers.settle()

    def _hand_over(self, events: list[TokenEvent]) -> None:
        update = None if self._prefix_sink is None else self._scheduler.drain_prefix_changes()
        if self._prefix_sink is not None and update is not None:
            self._prefix_sink(events, update)
        elif events:
            self._sink(events)

    def _take_commands(self, *, wait: bool) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        patience = ARRIVAL_WAIT_S if self.transfers.waits else IDLE_WAIT_S
        try:
            while True:
                command = self._commands.get(block=wait, timeout=patience)
                wait = False
                events += command()
        except queue.Empty:
            return events

    def _fill(self) -> None:
        """Send plans until enough are with the ranks or nothing can be planned."""
        while len(self._in_flight) < self._max_in_flight:
            started = time.perf_counter()
            plan = self._scheduler.schedule(time.monotonic())
            if plan is None:
                return
            if self._trace_step is not None:
                plan = self._trace_step(plan, self._scheduler.planned)
            self._fleet.send(plan)
            sent = time.perf_counter()
            for seconds in self._scheduler.drain_queue_times():
                self._observer.on_queue_time(seconds)
            self._in_flight.append(_InFlight(sent, sent - started, len(plan.rows), plan.num_tokens))

    def _receive(self) -> list[TokenEvent]:
        result = self._fleet.receive(self._step_timeout_s)
        received = time.perf_counter()
        events = self._scheduler.update(result)
        if self._scheduler.in_flight == len(self._in_flight):
            return []  # it was no answer to a plan of ours
        step = self._in_flight.popleft()
        # the rank was free from the last result on, or from the sending where that came later
        free = max(self._last_result or 0.0, step.sent)
        overhead = max(received - free - result.execute_s, 0.0)
        overhead += step.schedule_s if step.sent == free else 0.0
        if result.idle_s is not None:
            # when we read a result says little of when the rank went on: neither bound is exceeded
            overhead = min(overhead, result.idle_s)
        self._last_result = received if self._in_flight or self._scheduler.has_work else None
        if not step.rows:
            return list(events)  # blocks were moved, nothing else
        self._observer.on_step(
            StepTimes(
                schedule_s=step.schedule_s,
                execute_s=result.execute_s,
                update_s=time.perf_counter() - received,
                overhead_s=overhead,
                rows=step.rows,
                tokens=step.tokens,
                new_tokens=sum(len(event.tokens) for event in events),
            )
        )
        return list(events)

    def _end(self, error: GroupLost) -> None:
        self._lost = error
        self.transfers.end()
        self._on_lost(error)
        self._fleet.stop(at_once=not self._stopping.is_set())
