"""Hand-overs: requests go on at another replica from their KV blocks, without computing them again.

The schedulers decide what they can let go of and take in; here is only who says what to whom::

    source                          here                         target
    offer full blocks   <---------- 1    2 ------------------->  reserve places, fetch
    (the request runs on)                3 <-------------------  all ranks have the full blocks
    freeze, offer rest  <---------- 4                            (fetches the rest)
    stands still        ----------> 5    6 <-------------------  all ranks have the rest
                                    7    the stream is the target's
    withdraw, forget    <---------- 8    8 ------------------->  adopt: the next step computes

A stream belongs to one replica at any moment, by what is written down here: step 7 is the commit,
and everything before it can be undone. Whatever fails, dies or takes too long, blocks on both sides
are given back, and the stream goes on by the other path: its tokens so far are computed again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from phalanx.controller.handle import ReplicaHandle
from phalanx.controller.scheduling.outline import Standing
from phalanx.controller.stream import Stream
from phalanx.protos.errors import PhalanxError, TransferFailed

TIMEOUT_S = 20.0
"""For a whole hand-over; longer than ranks wait for each other."""
CONCURRENT = 4
"""Hand-overs from one replica at a time; more would share the same sockets and cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A hand-over that was tried, for those who ask or count."""

    reason: str
    """"drain", "decode", "rebalance" or "prefix"."""
    source: int
    target: int
    outcome: str
    """"moved", or "failed"."""
    num_bytes: int
    seconds: float
    gap_s: float
    """In which the stream stood still."""
    error: str = ""
    later: bool = False
    """Whether the same may succeed after a while."""

    def __str__(self) -> str:
        way = f"{self.reason}: replica-{self.source} to replica-{self.target}"
        if self.outcome != "moved":
            return f"{way}: {self.outcome} ({self.error})"
        return (
            f"{way}: {self.num_bytes / 2**20:.1f} MiB in {1e3 * self.seconds:.0f} ms, "
            f"of which it stood still {1e3 * self.gap_s:.0f} ms"
        )


PassOn = Callable[[Stream, ReplicaHandle, int, Mapping[int, Standing]], "asyncio.Future[None]"]
"""Makes the target the stream's replica, from a transfer; done when it has adopted it."""
Keep = Callable[[Stream | None, Move], None]
"""Told of every hand-over that was tried, and of which stream, if of one."""


class Mover:
    """Runs hand-overs. Belongs to one event loop."""

    def __init__(self, pass_on: PassOn, keep: Keep, timeout_s: float = TIMEOUT_S) -> None:
        self._pass_on, self._keep, self._timeout_s = pass_on, keep, timeout_s
        self._numbers = itertools.count()
        self._moving: set[Stream] = set()

    def moves(self, stream: Stream) -> bool:
        """Whether a hand-over of the stream is under way."""
        return stream in self._moving

    async def move(
        self, stream: Stream, source: ReplicaHandle, target: ReplicaHandle, reason: str
    ) -> Move:
        """Hand a stream over. What failed has changed nothing: the stream is still the source's,
        if that lives. Never raises for trouble of replicas."""
        run = _Run(next(self._numbers), source, target)
        started, error, outcome, later = time.monotonic(), "", "failed", False
        self._moving.add(stream)
        try:
            async with asyncio.timeout(self._timeout_s):
                standings = await run.copy(stream.name)
                if stream.replica != source.index or stream.finished or not standings:
                    raise TransferFailed("the request ended meanwhile")
                adopted = self._pass_on(stream, target, run.number, standings)
            run.passed_on = True
            await adopted
            outcome = "moved"
        except TimeoutError:
            error = f"not done in {self._timeout_s:g} s"
        except PhalanxError as failed:
            error, later = str(failed), isinstance(failed, TransferFailed) and failed.later
        finally:
            self._moving.discard(stream)
            run.clean()
        move = Move(
            reason=reason,
            source=source.index,
            target=target.index,
            outcome=outcome,
            num_bytes=run.num_bytes,
            seconds=time.monotonic() - started,
            gap_s=time.monotonic() - run.frozen_at if run.frozen_at else 0.0,
            error=error,
            later=later,
        )
        self._keep(stream, move)
        return move

    async def copy_prefix(
        self, tenant: str, token_ids: list[int], source: ReplicaHandle, target: ReplicaHandle
    ) -> Move:
        """Copy what the source has cached of a prompt to the target. Never raises for trouble."""
        run = _Run(next(self._numbers), source, target)
        started, error, outcome = time.monotonic(), "", "failed"
        try:
            async with asyncio.timeout(self._timeout_s):
                await run.copy_prefix(tenant, token_ids)
            outcome = "moved"
        except TimeoutError:
            error = f"not done in {self._timeout_s:g} s"
        except PhalanxError as failed:
            error = str(failed)
        finally:
            run.clean()
        move = Move(
            reason="prefix",
            source=source.index,
            target=target.index,
            outcome=outcome,
            num_bytes=run.num_bytes,
            seconds=time.monotonic() - started,
            gap_s=0.0,
            error=error,
        )
        self._keep(None, move)
        return move


class _Run:
    """One transfer, whose two sides are given back at the end, whatever happened."""

    def __init__(self, number: int, source: ReplicaHandle, target: ReplicaHandle) -> None:
        self.number = number
        self._from, self._to = source.replica.transfers, target.replica.transfers
        self.num_bytes, self.frozen_at = 0, 0.0
        self.passed_on = False

    async def copy(self, name: str) -> Mapping[int, Standing]:
        """All blocks of a request, which then stands still where it says."""
        exchange = self._from.exchange
        if exchange is None or self._to.exchange is None:
            raise TransferFailed("the ranks exchange no blocks")
        outline = await asyncio.wrap_future(self._from.offer(self.number, name))
        tail = await asyncio.wrap_future(self._to.reserve(self.number, outline, exchange))
        await asyncio.wrap_future(self._to.arrived(self.number, 0))
        self.frozen_at = time.monotonic()
        standings, self.num_bytes = await asyncio.gather(
            asyncio.wrap_future(self._from.freeze(self.number, tail)),
            asyncio.wrap_future(self._to.arrived(self.number, 1)),
        )
        return standings

    async def copy_prefix(self, tenant: str, token_ids: list[int]) -> None:
        """A cached prefix, which can then be matched at the target."""
        exchange = self._from.exchange
        if exchange is None or self._to.exchange is None:
            raise TransferFailed("the ranks exchange no blocks")
        outline = await asyncio.wrap_future(self._from.offer_prefix(self.number, tenant, token_ids))
        await asyncio.wrap_future(self._to.reserve_prefix(self.number, outline, exchange))
        self.num_bytes = await asyncio.wrap_future(self._to.arrived(self.number, 0))
        await asyncio.wrap_future(self._to.keep_prefix(self.number))

    def clean(self) -> None:
        """Withdraw the offer; forget at the target what nobody has adopted."""
        self._from.withdraw(self.number)
        if not self.passed_on:
            self._to.give_up(self.number)
