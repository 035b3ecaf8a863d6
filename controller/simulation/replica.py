"""A modelled replica: its queue, its running streams, its prefix cache and the time of its steps.

What is modelled is what placement can change. A step takes the time that its profile says; prompts
are computed in chunks, in the order of arrival, beside the running streams; a request is begun when
a place is free and the pool has room for all of it. Equal steps are taken together, so that the
cost of a simulation does not depend on the length of answers.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from phalanx.controller.kvcache.changes import PrefixUpdate
from phalanx.controller.observing import Silent, StepTimes
from phalanx.controller.routing.pace import PaceMeter
from phalanx.controller.routing.router import Work

from .profile import Profile
from .traces import BLOCK_TOKENS, Turn


@dataclass(slots=True, eq=False)
class Job:
    """A request at a replica."""

    turn: Turn
    replica: int
    left: int = 0
    """Prompt tokens to be computed yet."""
    cached_tokens: int = 0
    known_tokens: int = 0
    """Tokens of the prompt that some request had before it."""
    first_token_s: float = 0.0
    until: int = 0
    """The replica's count of steps at which it ends."""
    pinned: list[int] = field(default_factory=list)
    """Named blocks that it holds."""
    unnamed: int = 0
    """Further blocks that it holds."""
    charged: Work = Work()  # noqa: RUF009
    """What the placer was told of it."""


class Cache:
    """Named blocks of one pool: held ones, and idle ones from least to most recently used."""

    def __init__(self, blocks: int, epoch: int = 0) -> None:
        self._blocks, self._epoch, self._changes = blocks, epoch, 0
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.busy = 0
        """Blocks that jobs hold, named or not."""
        self._keys, self._added = array("Q"), bytearray()

    def __len__(self) -> int:
        """Named blocks."""
        return len(self._holders) + len(self._idle)

    def run(self, keys: list[int]) -> int:
        """How many of these blocks, from the first on, are there."""
        run = 0
        for key in keys:
            if key not in self._holders and key not in self._idle:
                break
            run += 1
        return run

    def admit(self, job: Job) -> bool:
        """Take a job's blocks; False, changing nothing, where there is no room for all of it."""
        turn = job.turn
        keys = turn.prompt_keys
        hit = keys[: self.run(keys)]
        fresh = -(-(turn.prompt_tokens + turn.output_tokens) // BLOCK_TOKENS) - len(hit)
        revived = sum(key in self._idle for key in hit)
        if self.busy + fresh + revived > self._blocks:
            return False
        for key in hit:
            self._hold(key)
        job.pinned, job.unnamed = hit, fresh
        job.cached_tokens = len(hit) * BLOCK_TOKENS
        job.left = turn.prompt_tokens - job.cached_tokens
        self.busy += fresh
        while len(self._idle) > self._blocks - self.busy:
            key, _ = self._idle.popitem(last=False)
            self._record(key, added=False)
        return True

    def name(self, job: Job, keys: list[int]) -> None:
        """The blocks of a job with these names are full; one that is there twice stays unnamed."""
        for key in keys[len(job.pinned) :]:
            if key in self._holders or key in self._idle:
                break
            self._holders[key] = 1
            self._record(key, added=True)
            job.pinned.append(key)
            job.unnamed -= 1

    def release(self, job: Job) -> None:
        """The job has ended: what it held is idle or free."""
        self.busy -= job.unnamed
        for key in reversed(job.pinned):
            if self._holders[key] > 1:
                self._holders[key] -= 1
                continue
            del self._holders[key]
            self._idle[key] = None
            self.busy -= 1

    def drain(self) -> PrefixUpdate | None:
        """What came and went since the last call."""
        if not self._keys:
            return None
        update = PrefixUpdate(
            epoch=self._epoch, first=self._changes, keys=self._keys, added=bytes(self._added)
        )
        self._changes = update.next
        self._keys, self._added = array("Q"), bytearray()
        return update

    def _hold(self, key: int) -> None:
        if key in self._idle:
            del self._idle[key]
            self._holders[key] = 1
            self.busy += 1
        else:
            self._holders[key] += 1

    def _record(self, key: int, *, added: bool) -> None:
        self._keys.append(key)
        self._added.append(added)


class ModelledReplica:
    """One replica. `due` is when its equal steps end; then `fire` takes them and begins others."""

    def __init__(self, index: int, profile: Profile) -> None:
        self.index, self._profile = index, profile
        self.cache = Cache(profile.kv_tokens // BLOCK_TOKENS)
        self.meter = PaceMeter(Silent())
        self.due: float | None = None
        self._queue: deque[Job] = deque()
        self._prompts: list[Job] = []
        self._streams: list[tuple[int, int, Job]] = []
        self._count = self._numbers = self._steps = 0
        self._began = self._step_s = 0.0
        self._parts: list[tuple[Job, int]] = []

    def take(self, now: float, job: Job) -> bool:
        """A job comes. True when `due` is another one now."""
        self._queue.append(job)
        before = self.due
        if before is None:
            self._begin(now)
        elif not self._parts and len(self._streams) < self._profile.places:
            # streams only: the job may begin after the step that runs
            done = int((now - self._began) / self._step_s) + 1
            if done < self._steps:
                self._steps = done
                self.due = self._began + done * self._step_s
        return self.due != before

    def fire(self) -> tuple[list[Job], list[Job]]:
        """Take the steps that end at `due`: jobs with a first token, and jobs that ended."""
        now, first, ended = self.due or 0.0, [], []
        self._observe()
        self._count += self._steps
        for job, tokens in self._parts:
            job.left -= tokens
            if not job.left:
                self._prompts.remove(job)
                first.append(job)
                job.first_token_s = now
                self.cache.name(job, job.turn.prompt_keys)
                job.until = self._count + job.turn.output_tokens - 1
                self._numbers += 1
                heapq.heappush(self._streams, (job.until, self._numbers, job))
        while self._streams and self._streams[0][0] <= self._count:
            job = heapq.heappop(self._streams)[2]
            self.cache.name(job, job.turn.keys)
            self.cache.release(job)
            ended.append(job)
        self._begin(now)
        return first, ended

    def _begin(self, now: float) -> None:
        places, queue = self._profile.places, self._queue
        while queue and len(self._prompts) + len(self._streams) < places:
            if not self.cache.admit(queue[0]):
                break
            self._prompts.append(queue.popleft())
        self._parts, self._began = [], now
        streams, most = len(self._streams), self._profile.tokens_per_step
        if self._prompts and self._prompts[0].left > most:
            self._steps = (self._prompts[0].left - 1) // most
            if streams:
                self._steps = min(self._steps, self._streams[0][0] - self._count)
            self._parts = [(self._prompts[0], self._steps * most)]
            self._step_s = self._profile.step_s(most, streams)
        elif self._prompts:
            room = most
            for job in self._prompts:
                if not room:
                    break
                self._parts.append((job, min(job.left, room)))
                room -= self._parts[-1][1]
            self._steps, self._step_s = 1, self._profile.step_s(most - room, streams)
        elif streams:
            self._steps = self._streams[0][0] - self._count
            self._step_s = self._profile.step_s(0, streams)
        else:
            self.due = None
            return
        self.due = now + self._steps * self._step_s

    def _observe(self) -> None:
        tokens = sum(tokens for _, tokens in self._parts) // self._steps
        streams = len(self._streams)
        self.meter.on_step(
            StepTimes(
                schedule_s=0.0,
                execute_s=self._step_s,
                update_s=0.0,
                overhead_s=0.0,
                rows=streams + len(self._parts),
                tokens=streams + tokens,
            )
        )
