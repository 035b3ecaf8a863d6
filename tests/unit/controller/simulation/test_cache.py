"""A modelled cache, which keeps segments of chains, against one that keeps single blocks."""

from __future__ import annotations

from collections import Counter, OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.controller.simulation.cache import Cache
from phalanx.controller.simulation.replica import Job
from phalanx.controller.simulation.traces import BLOCK_TOKENS, Session

BLOCKS = 24
SHARED = [[], [1, 2, 3], [11, 12, 13, 14, 15, 16]]


class Blocks:
    """Every block by itself: held by so many jobs, or idle, the least recently used first."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.free = BLOCKS
        self.of: dict[Job, list[list[int]]] = {}
        """Of each job, the named blocks that it holds: the shared ones, its own."""

    def names(self) -> set[int]:
        return set(self.held) | set(self.idle)

    def admit(self, job: Job) -> int | None:
        """The blocks that are cached."""
        turn, hit = job.turn, list[int]()
        for key in turn.prompt_keys:
            if key not in self.names():
                break
            hit.append(key)
        needed = -(-(turn.prompt_tokens + turn.output_tokens) // BLOCK_TOKENS) - len(hit)
        if needed > self.free + sum(key not in hit for key in self.idle):
            return None
        for key in hit:
            self.idle.pop(key, None)
            self.held[key] += 1
        while needed > self.free:
            self.idle.popitem(last=False)
            self.free += 1
        self.free -= needed
        common = len(turn.session.shared)
        self.of[job] = [hit[:common], hit[common:]]
        return len(hit)

    def name(self, job: Job, blocks: int) -> None:
        keys, common = job.turn.keys[:blocks], len(job.turn.session.shared)
        for mine, all_of_them in zip(self.of[job], (keys[:common], keys[common:]), strict=True):
            for key in all_of_them[len(mine) :]:
                if key in self.names():
                    break
                self.held[key] += 1
                mine.append(key)

    def release(self, job: Job) -> None:
        shared, own = self.of.pop(job)
        turn = job.turn
        whole = -(-(turn.prompt_tokens + turn.output_tokens) // BLOCK_TOKENS)
        self.free += whole - len(shared) - len(own)
        for key in [*reversed(own), *reversed(shared)]:
            self.held[key] -= 1
            if not self.held[key]:
                del self.held[key]
                self.idle[key] = None


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 900), st.integers(1, 300), st.integers(0, 3)),
        max_size=60,
    )
)
@settings(deadline=None, max_examples=200)
def test_segments_are_the_same_as_blocks(steps: list[tuple[int, int, int, int]]) -> None:
    """Each step lets a user ask if he does not wait, and compute some of his prompt or end."""
    cache, model, told = Cache(BLOCKS), Blocks(), set[int]()
    users: dict[int, tuple[Session, Job | None]] = {}
    for number, (user, prompt, output, what) in enumerate(steps):
        session, job = users.get(user) or (None, None)
        if session is None:
            session = Session(number, "a", SHARED[user % 3], [])
        if job is None:
            session.turns.append((prompt, output, 0.0))
            job = Job(session.ask(0.0), 0)
            hit = model.admit(job)
            assert cache.admit(job) == (hit is not None)
            if hit is None:
                users.pop(user, None)
                continue
            assert job.cached_tokens == hit * BLOCK_TOKENS
            users[user] = session, job
        elif what:
            blocks = job.turn.prompt_tokens // BLOCK_TOKENS * what // 3
            cache.name(job, blocks)
            model.name(job, blocks)
        else:
            for one in (cache, model):
                one.name(job, job.turn.full_blocks)
                one.release(job)
            users[user] = session, None
        assert cache.names() == model.names() and len(cache) == len(model.names())
        assert cache.busy == BLOCKS - model.free - len(model.idle)
        if (update := cache.drain()) is not None:
            for key, added in zip(update.keys, update.added, strict=True):
                assert (key in told) != added
                told ^= {key}
        assert told == cache.names()
