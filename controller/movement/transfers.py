"""What a step loop is asked by others about transfers of blocks, and when it answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from phalanx.controller.cluster.fleet import Fleet
from phalanx.controller.scheduling.outline import Outline, PrefixOutline, Standing
from phalanx.controller.scheduling.request import Request, TokenEvent
from phalanx.controller.scheduling.scheduler import Scheduler
from phalanx.protos.errors import GroupLost, PhalanxError, TransferFailed
from phalanx.protos.transfers import TRANSFER_TIMEOUT_S, Exchange

T = TypeVar("T")
STUCK_S = 4 * TRANSFER_TIMEOUT_S
Put = Callable[[Callable[[], Sequence[TokenEvent]]], None]


class Transfers:
    """One replica's side of hand-overs, as source and as target.

    Any thread may call the upper half; answers come as futures, after the events of the same turn
    of the step loop, or as `TransferFailed`, also when the loop has ended. The lower half is the
    loop's own.
    """

    def __init__(self, scheduler: Scheduler, fleet: Fleet, put: Put) -> None:
        """put: gives the loop a command to run before it plans the next step."""
        self._scheduler, self._fleet, self._put = scheduler, fleet, put
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self._ended = False
        self._answers: list[Callable[[], None]] = []
        self._due: list[tuple[Future[Any], Callable[[], Any]]] = []
        self._given_up: dict[int, float] = {}

    # --- for others ---

    @property
    def exchange(self) -> Exchange | None:
        """Where the ranks hand out blocks, if they do."""
        return self._fleet.exchange

    def offer(self, transfer: int, request_id: str) -> Future[Outline]:
        """Offer a running request's full blocks; it goes on meanwhile."""

        def work() -> Outline:
            outline, offer = self._scheduler.departures.offer(transfer, request_id)
            self._fleet.tell(offer)
            return outline

        return self._ask(work)

    def offer_prefix(
        self, transfer: int, tenant: str, token_ids: Sequence[int]
    ) -> Future[PrefixOutline]:
        """Offer what is cached of a prompt."""

        def work() -> PrefixOutline:
            outline, offer = self._scheduler.departures.offer_prefix(transfer, tenant, token_ids)
            self._fleet.tell(offer)
            return outline

        return self._ask(work)

    def freeze(self, transfer: int, tail: int) -> Future[dict[int, Standing]]:
        """Offer the rest and let the request stand still; answered when the results of its last
        step are here."""
        departures = self._scheduler.departures

        def work() -> None:
            self._fleet.tell(departures.freeze(transfer, tail))

        return self._ask(work, then=lambda: departures.settled(transfer))

    def withdraw(self, transfer: int) -> None:
        """End an offer; a request that is still here runs on."""

        def command() -> Sequence[TokenEvent]:
            message = self._scheduler.departures.withdraw(transfer)
            if message is not None:
                self._fleet.tell(message)
            return ()

        self._put(command)

    def reserve(self, transfer: int, outline: Outline, source: Exchange) -> Future[int]:
        """Open tables for a request and begin to fetch its blocks; the tail to `freeze` with."""
        arrivals = self._scheduler.arrivals

        def work() -> int:
            take = arrivals.reserve(transfer, outline, source, self._ranks())
            self._fleet.tell(take)
            return arrivals.tail_blocks(outline)

        return self._ask(work)

    def reserve_prefix(
        self, transfer: int, outline: PrefixOutline, source: Exchange
    ) -> Future[None]:
        """The same for a prefix."""

        def work() -> None:
            arrivals = self._scheduler.arrivals
            self._fleet.tell(arrivals.reserve_prefix(transfer, outline, source, self._ranks()))

        return self._ask(work)

    def arrived(self, transfer: int, part: int) -> Future[int]:
        """Answered with the bytes so far when all ranks have a part."""
        arrivals = self._scheduler.arrivals
        return self._ask(lambda: None, then=lambda: arrivals.arrived(transfer, part, self._ranks()))

    def adopt(
        self, transfer: int, group: Sequence[Request], standings: Mapping[int, Standing]
    ) -> Future[None]:
        """Go on with a request from what has come."""

        def work() -> None:
            try:
                self._scheduler.adopt(transfer, group, standings)
            except TransferFailed:
                self._scheduler.arrivals.give_up(transfer)
                raise

        return self._ask(work)

    def keep_prefix(self, transfer: int) -> Future[None]:
        """Let a prefix that has come be matched."""
        return self._ask(lambda: self._scheduler.arrivals.keep_prefix(transfer))

    def give_up(self, transfer: int) -> None:
        """Forget what has come."""

        def command() -> Sequence[TokenEvent]:
            self._scheduler.arrivals.give_up(transfer)
            self._given_up[transfer] = time.monotonic()
            return ()

        self._put(command)

    # --- for the step loop ---

    @property
    def waits(self) -> bool:
        """Whether ranks may have something to say at any time, or an answer is due."""
        return bool(self._answers or self._due or len(self._scheduler.arrivals))

    def settle(self) -> None:
        """Take in what ranks have said and give the answers that are due."""
        if len(self._scheduler.arrivals):
            for rank, message in self._fleet.drain_taken():
                self._scheduler.arrivals.taken(rank, message)
            self._check_given_up()
        answers, self._answers = self._answers, []
        for answer in answers:
            answer()
        due, self._due = self._due, []
        for future, look in due:
            try:
                result = look()
            except PhalanxError as error:
                self._close(future, error=error)
            else:
                if result is None:
                    self._due.append((future, look))
                else:
                    self._close(future, result)

    def end(self) -> None:
        """The loop has ended: nobody will answer."""
        with self._lock:
            self._ended = True
            open_, self._open = self._open, set()
        for future in open_:
            if future.set_running_or_notify_cancel():
                future.set_exception(TransferFailed("the replica is gone"))

    def _check_given_up(self) -> None:
        """Blocks of a transfer stay taken until all ranks have answered; one that never does is
        not alive."""
        now, open_ = time.monotonic(), self._scheduler.arrivals.open
        self._given_up = {key: at for key, at in self._given_up.items() if key in open_}
        if any(now - at > STUCK_S for at in self._given_up.values()):
            raise GroupLost(f"a rank has not ended a transfer in {STUCK_S:g} s")

    def _ranks(self) -> int:
        exchange = self._fleet.exchange
        if exchange is None:
            raise TransferFailed("the ranks exchange no blocks")
        return len(exchange.addresses)

    def _ask(self, work: Callable[[], T], then: Callable[[], Any] | None = None) -> Future[Any]:
        """Let the loop work; the answer is the result, or what `then` says once it is not None."""
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(TransferFailed("the replica is gone"))
                return future
            self._open.add(future)

        def command() -> Sequence[TokenEvent]:
            try:
                result = work()
            except GroupLost:
                raise  # of this replica: it ends the loop
            except PhalanxError as error:
                failed = error  # the name of an except clause ends with it
                self._answers.append(lambda: self._close(future, error=failed))
            else:
                if then is None:
                    self._answers.append(lambda: self._close(future, result))
                else:
                    self._due.append((future, then))
            return ()

        self._put(command)
        return future

    def _close(
        self, future: Future[Any], result: object = None, *, error: PhalanxError | None = None
    ) -> None:
        with self._lock:
            if future not in self._open:
                return
            self._open.discard(future)
        if not future.set_running_or_notify_cancel():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
