"""A modelled replica: its queue, its running streams, its prefix cache and the time of its steps.

What is modelled is what placement can change. A step takes the time that its profile says; prompts
are computed in chunks, in the order of arrival, beside the running streams; a request is begun when
a place is free, the step has tokens left, and the pool has room for all of it. Equal steps are taken together, so that the
cost of a simulation does not depend on the length of answers.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from phalanx.controller.observing import Silent
from phalanx.controller.routing.pace import PaceMeter
from phalanx.controller.routing.router import Work

from .cache import Cache
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
    planned: int = 0
    """Prompt tokens that are cached or computed, the running steps included."""
    shared_pin: int = 0
    """The first block beyond those that it holds of what others have too; 0: it holds none."""
    own_pin: int = 0
    """The same of its own conversation's."""
    unnamed: int = 0
    """Further blocks that it holds."""
    charged: Work = Work()  # noqa: RUF009
    """What the placer was told of it."""


class ModelledReplica:
    """One replica. `due` is when its equal steps end; then `fire` takes them and begins others."""

    def __init__(self, index: int, profile: Profile, *, watched: bool = True) -> None:
        """watched: whether its pace is measured, and changes of its cache are recorded."""
        self.index, self._profile = index, profile
        self.cache = Cache(profile.kv_tokens // BLOCK_TOKENS, told=watched)
        self.meter = PaceMeter(Silent())
        self.due: float | None = None
        self._watched = watched
        self._queue: deque[Job] = deque()
        self._prompts: list[Job] = []
        self._streams: list[tuple[int, int, Job]] = []
        self._count = self._numbers = self._steps = 0
        self._began = self._step_s = 0.0
        self._parts: list[tuple[Job, int]] = []
        self._tokens = 0

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
        now, first, ended = self.due or 0.0, list[Job](), list[Job]()
        streams = self._streams
        if self._watched:
            rows = len(streams)
            self.meter.saw(rows + len(self._parts), rows + self._tokens, self._step_s)
        self._count += self._steps
        for job, tokens in self._parts:
            job.left -= tokens
            if not job.left:
                self._prompts.remove(job)
                first.append(job)
                job.first_token_s = now
                self._numbers += 1
                until = self._count + job.turn.output_tokens - 1
                heapq.heappush(streams, (until, self._numbers, job))
        while streams and streams[0][0] <= self._count:
            job = heapq.heappop(streams)[2]
            self.cache.name(job, job.turn.full_blocks)
            self.cache.release(job)
            ended.append(job)
        self._begin(now)
        return first, ended

    def _begin(self, now: float) -> None:
        """The next equal steps. As in the scheduler, a prompt is begun, and looked up in the cache,
        in the first step that has tokens left for it; its blocks are there for later steps."""
        profile, queue, prompts = self._profile, self._queue, self._prompts
        parts = self._parts = []
        self._began = now
        streams, room = len(self._streams), profile.tokens_per_step
        places = profile.places - streams
        if queue and not prompts and places > 0 and self.cache.admit(queue[0]):
            prompts.append(queue.popleft())
        if prompts:
            job, steps = prompts[0], 1
            if job.left > room:
                steps = (job.left - 1) // room
                if streams:
                    steps = min(steps, self._streams[0][0] - self._count)
                self._tokens = room
                self._plan(parts, job, steps * room)
            else:
                for job in prompts:
                    tokens = min(job.left, room)
                    room -= tokens
                    self._plan(parts, job, tokens)
                while room and queue and len(prompts) < places and self.cache.admit(queue[0]):
                    job = queue.popleft()
                    prompts.append(job)
                    tokens = min(job.left, room)
                    room -= tokens
                    self._plan(parts, job, tokens)
                self._tokens = profile.tokens_per_step - room
        elif streams:
            steps, self._tokens = self._streams[0][0] - self._count, 0
        else:
            self.due = None
            return
        for job, _ in parts:
            self.cache.name(job, job.planned // BLOCK_TOKENS)
        self._steps, self._step_s = steps, profile.step_s(self._tokens, streams)
        self.due = now + steps * self._step_s

    def _plan(self, parts: list[tuple[Job, int]], job: Job, tokens: int) -> None:
        parts.append((job, tokens))
        job.planned += tokens
