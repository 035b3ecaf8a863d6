"""Time passes: requests arrive, a policy places them, modelled replicas compute them."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from phalanx.protos.errors import ConfigError

from .policies import POLICIES
from .profile import Profile
from .replica import Job, ModelledReplica
from .traces import BLOCK_TOKENS, TRACES, Session, Turn

SLO_FIRST_S, SLO_TOKEN_S = 1.0, 0.05
"""A request is good when its first token takes at most the one, and those after it the other, on
average."""
GOOD = f"good: first token within {SLO_FIRST_S:g} s, the others {SLO_TOKEN_S:g} s each on average"

WARM = 1 / 3


@dataclass(frozen=True, slots=True)
class Setting:
    """One simulation."""

    policy: str
    trace: str
    replicas: int = 1000
    requests: int = 100_000
    load: float = 0.8
    """Arrivals as a part of what the replicas could serve if nothing were cached twice."""
    seed: int = 0
    profile: Profile = field(default_factory=Profile)


def check_load(load: float) -> None:
    """Raises `ConfigError` for a load that cannot be simulated."""
    if not 0 < load <= 10:
        raise ConfigError(f"load: {load} must be above 0 and at most 10")


@dataclass(slots=True)
class Outcome:
    """What was measured, after the first third of the requests, which warms the caches."""

    first_s: list[float] = field(default_factory=list)
    """Seconds from arrival to first token."""
    token_s: list[float] = field(default_factory=list)
    """Seconds for each token after it."""
    decision_s: list[float] = field(default_factory=list)
    """Seconds of this machine's time for each decision, its bookkeeping included."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    oracle_tokens: int = 0
    """That one cache without an end would have had."""
    simulated_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """The figures that are compared. goodput: good requests in a second."""
        first, token = np.array(self.first_s), np.array(self.token_s)
        good = (first <= SLO_FIRST_S) & (token <= SLO_TOKEN_S)
        decisions = np.array(self.decision_s)
        return {
            "requests": len(first),
            "ttft_mean_s": float(first.mean()),
            "ttft_p50_s": float(np.percentile(first, 50)),
            "ttft_p99_s": float(np.percentile(first, 99)),
            "time_per_token_s": float(token.mean()),
            "goodput_per_s": float(good.sum()) / self.simulated_s,
            "good_share": float(good.mean()),
            "hit_rate": self.cached_tokens / max(self.prompt_tokens, 1),
            "oracle_hit_rate": self.oracle_tokens / max(self.prompt_tokens, 1),
            "decisions_per_s": len(decisions) / float(decisions.sum()),
            "decision_p99_s": float(np.percentile(decisions, 99)),
        }


def arrival_rate(setting: Setting) -> float:
    """Sessions in a second that keep the replicas busy to `load`.

    Counted on a sample of sessions: prompt tokens that are new, and a share of a half-full batch's
    steps for each output token.
    """
    profile, sessions = setting.profile, TRACES[setting.trace](setting.seed + 1)
    streams = profile.places / 2
    token_s = profile.step_s(0, int(streams)) / streams
    work_s, sample = 0.0, 2000
    for session in itertools.islice(sessions, sample):
        work_s += sum(new * profile.token_s + out * token_s for new, out, _ in session.turns)
    return setting.load * setting.replicas * sample / work_s


class Simulation:
    """One run. `run` returns when all requests have ended."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        profile = setting.profile
        make = POLICIES[setting.policy]
        self.replicas = [
            ModelledReplica(index, profile, watched=make.watches)
            for index in range(setting.replicas)
        ]
        self._policy = make(self.replicas, profile)
        self._sessions = TRACES[setting.trace](setting.seed)
        self._random = Random(setting.seed)
        self._rate = arrival_rate(setting)
        self._agenda: list[tuple[float, int, Session | ModelledReplica]] = []
        self._numbers = itertools.count()
        self._begun = self._ended = 0
        self._seen: set[int] = set()
        self._window_s = [0.0, 0.0]
        self.outcome = Outcome()

    def run(self, progress: Callable[[int], None] = lambda ended: None) -> Outcome:
        """Simulate. progress: called now and then with the requests that have ended."""
        now = 0.0
        self._next_session(now)
        while self._agenda:
            now, _, who = heapq.heappop(self._agenda)
            if isinstance(who, Session):
                self._ask(now, who)
            elif who.due == now:
                self._fire(now, who)
            if not self._ended % 4096:
                progress(self._ended)
        self.outcome.simulated_s = self._window_s[1] - self._window_s[0]
        return self.outcome

    def _at(self, when: float, who: Session | ModelledReplica) -> None:
        heapq.heappush(self._agenda, (when, next(self._numbers), who))

    def _next_session(self, now: float) -> None:
        if self._begun < self._setting.requests:
            session = next(self._sessions)
            before = self._counts
            self._begun += len(session.turns)
            if self._counts != before:
                self._window_s[before] = now
            self._at(now + self._random.expovariate(self._rate), session)

    def _ask(self, now: float, session: Session) -> None:
        if not session.told:
            self._next_session(now)
        turn = session.ask(now)
        began = time.thread_time()
        job = Job(turn, self._policy.choose(turn))
        self._policy.placed(job)
        if self._counts:
            self.outcome.decision_s.append(time.thread_time() - began)
        job.known_tokens = BLOCK_TOKENS * self._known(turn)
        replica = self.replicas[job.replica]
        if replica.take(now, job) and replica.due is not None:
            self._at(replica.due, replica)

    def _known(self, turn: Turn) -> int:
        """Blocks of the prompt that were in some request before; all of it is from now on."""
        session, shared = turn.session, turn.session.shared
        if shared and not session.known:
            session.known = len(shared) if shared[0] in self._seen else 0
            self._seen.add(shared[0])
        known = min(session.known, turn.prompt_blocks)
        session.known = turn.full_blocks
        return known

    @property
    def _counts(self) -> bool:
        """Whether the caches are warm, and sessions still begin."""
        return WARM * self._setting.requests <= self._begun < self._setting.requests

    def _fire(self, now: float, replica: ModelledReplica) -> None:
        first, ended = replica.fire()
        if replica.due is not None:
            self._at(replica.due, replica)
        if (update := replica.cache.drain()) is not None:
            self._policy.prefixes(replica.index, update)
        for job in first:
            self._policy.first_token(job)
        for job in ended:
            self._policy.ended(job)
            self._end(now, job)

    def _end(self, now: float, job: Job) -> None:
        self._ended += 1
        if self._counts:
            first_s = job.first_token_s - job.turn.arrival_s
            self.outcome.first_s.append(first_s)
            rest = max(job.turn.output_tokens - 1, 1)
            self.outcome.token_s.append((now - job.first_token_s) / rest)
            self.outcome.prompt_tokens += job.turn.prompt_tokens
            self.outcome.cached_tokens += job.cached_tokens
            self.outcome.oracle_tokens += job.known_tokens
        if job.turn.session.turns:
            self._at(now + job.turn.session.pause_s, job.turn.session)
