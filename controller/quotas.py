"""Quotas of tenants, kept in front of the engine: whatever front a request comes through."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from phalanx.protos.errors import InvalidArgument, ResourceExhausted
from phalanx.protos.sampling import SamplingParams

from .cluster.snapshot import ClusterSnapshot
from .movement.movement import KeptMove
from .routing.placer import Placement
from .scheduling.request import TokenEvent
from .server.engine import Engine, Take
from .tenants import TenantLimits, Tenants

RETRY_S = 1.0
"""When a tenant with too many open requests is told to come back: nobody knows when one ends."""
MAX_IDLE = 4096
"""Tenants remembered while they have nothing open."""


class Refusals(Protocol):
    """Told which quota has refused a request; see `metrics.QUOTAS`."""

    def on_quota(self, quota: str) -> None:
        """One request was refused."""


@dataclass(slots=True)
class _Account:
    """A bucket that fills by `tokens_per_minute`, and what is open."""

    requests: int = 0
    tokens: float = 0.0
    """May be spent now; below 0: spent beyond it, as an answer's length is not known before."""
    since: float = 0.0


class MeteredEngine:
    """`Engine` with quotas: counts what tenants have open and what they spend, and refuses.

    A request is begun while its tenant's bucket is above zero, and then has as many tokens as it
    asked for. So a tenant gets in a time t at most a minute's worth, its rate times t, and what
    its open requests go beyond that. Requests of an earlier life are counted, never refused.
    """

    def __init__(
        self,
        inner: Engine,
        tenants: Tenants,
        refusals: Refusals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner, self._tenants, self._refusals = inner, tenants, refusals
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

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
        """See `Engine.submit`; raises `ResourceExhausted` naming the quota."""
        limits, account = self._tenants.of(tenant), self._account(tenant)
        if known is None:
            _check_priority(tenant, priority, limits)
            self._check_room(tenant, account, limits)
            account.tokens -= len(prompt_token_ids)
        account.requests += 1
        events = self._inner.submit(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            tenant=tenant,
            deadline=deadline,
            known=known,
            priority=priority,
        )
        begun = known is not None
        try:
            async with contextlib.aclosing(events) as batches:  # type: ignore[type-var]
                async for batch in batches:
                    begun = True
                    account.tokens -= sum(len(event.tokens) for event in batch)
                    yield batch
        except ResourceExhausted:
            if not begun:
                self._refusals.on_quota("max_queued")
            raise
        finally:
            account.requests -= 1
            if not begun:
                account.tokens += len(prompt_token_ids)  # it was refused, or left at once

    def divert(self, request_id: str, tenant: str, take: Take) -> None:
        """See `Engine.divert`."""
        account = self._account(tenant)  # which stays as long as something is open

        def counted(event: TokenEvent) -> None:
            account.tokens -= len(event.tokens)
            take(event)

        self._inner.divert(request_id, tenant, counted)

    def check_room(self, tenant: str) -> None:
        """See `Engine.check_room`; raises `ResourceExhausted` naming the quota."""
        self._check_room(tenant, self._account(tenant), self._tenants.of(tenant))
        try:
            self._inner.check_room(tenant)
        except ResourceExhausted:
            self._refusals.on_quota("max_queued")
            raise

    def stop_sample(self, request_id: str, sample_index: int, tenant: str) -> None:
        """See `Engine.stop_sample`."""
        self._inner.stop_sample(request_id, sample_index, tenant)

    def abort(self, request_id: str, tenant: str) -> bool:
        """See `Engine.abort`."""
        return self._inner.abort(request_id, tenant)

    def snapshot(self) -> ClusterSnapshot:
        """See `Engine.snapshot`."""
        return self._inner.snapshot()

    def moves(self) -> Sequence[KeptMove]:
        """See `Engine.moves`."""
        return self._inner.moves()

    def placements(self) -> Sequence[Placement]:
        """See `Engine.placements`."""
        return self._inner.placements()

    def _check_room(self, tenant: str, account: _Account, limits: TenantLimits) -> None:
        if limits.max_requests is not None and account.requests >= limits.max_requests:
            self._refusals.on_quota("max_requests")
            text = f"max_requests of tenant {tenant!r}: {account.requests} requests are open, "
            raise ResourceExhausted(f"{text}{limits.max_requests} may be", RETRY_S)
        if limits.tokens_per_minute is not None and account.tokens <= 0:
            self._refusals.on_quota("tokens_per_minute")
            wait_s = (1 - account.tokens) * 60 / limits.tokens_per_minute
            text = f"tokens_per_minute of tenant {tenant!r}: {limits.tokens_per_minute} are spent"
            raise ResourceExhausted(text, wait_s)

    def _account(self, tenant: str) -> _Account:
        """The tenant's account as of now."""
        now, rate = self._clock(), self._tenants.of(tenant).tokens_per_minute
        account = self._accounts.pop(tenant, None)
        if account is None:
            account = _Account(tokens=rate or 0, since=now)
        if rate is not None:
            filled = account.tokens + (now - account.since) * rate / 60
            account.tokens = min(filled, rate)
        account.since = now
        self._accounts[tenant] = account
        self._forget_idle()
        return account

    def _forget_idle(self) -> None:
        """Forget those who have nothing open and would have a full bucket, the longest idle first."""
        while len(self._accounts) > MAX_IDLE:
            tenant, account = next(iter(self._accounts.items()))
            if account.requests or self._clock() - account.since < 60:
                return
            del self._accounts[tenant]


def _check_priority(tenant: str, priority: int, limits: TenantLimits) -> None:
    low, high = limits.priorities
    if not low <= priority <= high:
        text = f"{priority} is not in [{low}, {high}], which tenant {tenant!r} may use"
        raise InvalidArgument.of("options.priority", text)
