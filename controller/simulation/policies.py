"""Ways to choose a replica: ours, which is the cluster's own code, and those it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from phalanx.controller.kvcache.changes import PrefixUpdate
from phalanx.controller.routing.index import GlobalPrefixIndex
from phalanx.controller.routing.lengths import expected_left
from phalanx.controller.routing.placer import Placer
from phalanx.controller.routing.router import Request, Work
from phalanx.protos.errors import ConfigError

from .profile import Profile
from .replica import Job, ModelledReplica
from .traces import BLOCK_TOKENS, Turn


class Policy(Protocol):
    """Chooses, and is told what happens."""

    watches: bool
    """Whether it looks at the replicas' caches and paces."""

    def choose(self, turn: Turn) -> int:
        """The replica for a request."""

    def placed(self, job: Job) -> None:
        """The request goes there."""

    def first_token(self, job: Job) -> None:
        """Its prompt is computed."""

    def ended(self, job: Job) -> None:
        """It has all its tokens."""

    def prefixes(self, replica: int, update: PrefixUpdate) -> None:
        """A replica's cached prefixes are others."""


class Ours:
    """`routing.Placer`, told what the engine tells it."""

    watches = True

    def __init__(self, replicas: Sequence[ModelledReplica], profile: Profile) -> None:
        self._placer, self._replicas = Placer(), replicas
        for replica in replicas:
            self._placer.loads.join(replica.index, profile.places, profile.kv_tokens)

    def choose(self, turn: Turn) -> int:
        output = self._expected(turn)
        request = Request(turn.prompt_tokens, 1, output)
        session, keys = turn.session, turn.prompt_keys
        name = str(session.number)
        decision = self._placer.choose_by_keys(session.tenant, name, keys, request, BLOCK_TOKENS)
        self._uncached = decision.uncached_tokens
        return decision.replica

    def placed(self, job: Job) -> None:
        output = self._expected(job.turn)
        self._charge(job, Work(self._uncached, 1, output, job.turn.prompt_tokens + output, 1))

    def first_token(self, job: Job) -> None:
        self._charge(job, job.charged._replace(queue_tokens=0, prompts=0))

    def ended(self, job: Job) -> None:
        self._placer.lengths.saw(job.turn.session.tenant, job.turn.output_tokens)
        self._charge(job, Work())

    def prefixes(self, replica: int, update: PrefixUpdate) -> None:
        if not self._placer.index.apply(replica, update):
            # what came first is all that there is
            listing = PrefixUpdate(epoch=update.epoch, first=0, listing=True)
            self._placer.index.apply(replica, listing)
            self._placer.index.apply(replica, update)

    def _expected(self, turn: Turn) -> int:
        return expected_left(self._placer.lengths.usual(turn.session.tenant), 0, None)

    def _charge(self, job: Job, work: Work) -> None:
        loads = self._placer.loads
        loads.measured(job.replica, self._replicas[job.replica].meter.pace)
        loads.charge(job.replica, job.charged, work)
        job.charged = work


class _Counting:
    """Knows how many requests each replica has."""

    watches = False

    def __init__(self, replicas: Sequence[ModelledReplica], profile: Profile) -> None:
        self._loads = np.zeros(len(replicas), np.int64)

    def placed(self, job: Job) -> None:
        self._loads[job.replica] += 1

    def first_token(self, job: Job) -> None:
        pass

    def ended(self, job: Job) -> None:
        self._loads[job.replica] -= 1

    def prefixes(self, replica: int, update: PrefixUpdate) -> None:
        pass


class RoundRobin(_Counting):
    """One after the other."""

    _next = -1

    def choose(self, turn: Turn) -> int:
        self._next += 1
        return self._next % len(self._loads)


class LeastLoaded(_Counting):
    """The replica with the fewest open requests."""

    def choose(self, turn: Turn) -> int:
        return int(self._loads.argmin())


class PrefixHash(_Counting):
    """The hash of the first tokens names the replica; one with more than 1.25 times the mean load
    passes a request on to the next (consistent hashing with bounded loads, Mirrokni 2018)."""

    BOUND = 1.25

    def choose(self, turn: Turn) -> int:
        size = len(self._loads)
        key = turn.session.names(0, 1)[0]
        place = key * 0x9E3779B97F4A7C15 % 2**64 * size >> 64
        most = math.ceil(self.BOUND * (int(self._loads.sum()) + 1) / size)
        while self._loads[place] >= most:
            place = (place + 1) % size
        return place


class CacheAware(_Counting):
    """In the style of SGLang's router: the longest match if it covers 30% of the prompt (of several
    holders the one with the fewest open requests), else the replica that holds least, what is on its
    way to it included; the fewest
    open requests once these differ by more than 64 and 1.5 times. It is given the exact index
    instead of a guess from what it has sent where."""

    MATCH, APART, TIMES = 0.3, 64, 1.5
    watches = True

    def __init__(self, replicas: Sequence[ModelledReplica], profile: Profile) -> None:
        super().__init__(replicas, profile)
        self._index, self._held = GlobalPrefixIndex(), np.zeros(len(replicas), np.int64)
        self._coming: dict[Job, int] = {}
        """Blocks that replicas will hold when these prompts are computed."""

    def choose(self, turn: Turn) -> int:
        most, least = int(self._loads.max()), int(self._loads.min())
        if most - least > self.APART and most > self.TIMES * least:
            return int(self._loads.argmin())
        runs = self._index.runs(turn.prompt_keys)
        if runs and runs[-1][0] * BLOCK_TOKENS > self.MATCH * turn.prompt_tokens:
            holders = [index for index in range(len(self._loads)) if runs[-1][1] >> index & 1]
            return holders[int(self._loads[holders].argmin())]
        return int(self._held.argmin())

    def placed(self, job: Job) -> None:
        super().placed(job)
        runs = self._index.runs(job.turn.prompt_keys)
        cached = max((depth for depth, holders in runs if holders >> job.replica & 1), default=0)
        self._coming[job] = job.turn.prompt_blocks - cached
        self._held[job.replica] += self._coming[job]

    def first_token(self, job: Job) -> None:
        self._held[job.replica] -= self._coming.pop(job)

    def prefixes(self, replica: int, update: PrefixUpdate) -> None:
        if not self._index.apply(replica, update):
            listing = PrefixUpdate(epoch=update.epoch, first=0, listing=True)
            self._index.apply(replica, listing)
            self._index.apply(replica, update)
        came = sum(update.added)
        self._held[replica] += 2 * came - len(update.added)


POLICIES: dict[str, type[Ours | RoundRobin | LeastLoaded | PrefixHash | CacheAware]] = {
    "ours": Ours,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-hash": PrefixHash,
    "cache-aware": CacheAware,
}


def check_policy(name: str) -> None:
    """Raises `ConfigError` where there is no such policy."""
    if name not in POLICIES:
        raise ConfigError(f"policy: {name!r} is not known; there are {', '.join(POLICIES)}")
