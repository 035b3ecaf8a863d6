"""The prefix cache of a modelled replica.

A pool's blocks are evicted least recently used first, of a prompt the last block first; whoever has
used a block has used all before it. So of each chain of blocks a cache holds a beginning, and what
is idle of it are few segments of one age each: a request costs the same however long its prompt.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from phalanx.controller.kvcache.changes import PrefixUpdate

from .traces import BLOCK_TOKENS, Session

if TYPE_CHECKING:
    from .replica import Job


class _Chain:
    """Blocks [start, length) of conversations that begin alike, or of one of them."""

    __slots__ = ("held", "idle", "length", "name", "pins", "session", "start")

    def __init__(self, name: int, session: Session, start: int) -> None:
        self.name, self.session, self.start = name, session, start
        self.length = self.held = start
        """Blocks before `held` are held by jobs, those from there on are idle."""
        self.pins: dict[int, int] = {}
        """How many jobs hold the blocks before this one."""
        self.idle: list[list[int]] = []
        """[age, start, stop], the oldest and last ones first."""


class Cache:
    """Named blocks of one pool: held ones, and idle ones from least to most recently used."""

    def __init__(self, blocks: int, *, told: bool = True, epoch: int = 0) -> None:
        """told: whether changes are recorded."""
        self._blocks, self._told, self._epoch, self._changes = blocks, told, epoch, 0
        self._chains: dict[int, _Chain] = {}
        self._ages: OrderedDict[int, _Chain] = OrderedDict()
        self._age = self._idle = 0
        self.busy = 0
        """Blocks that jobs hold, named or not."""
        self._keys, self._added = array("Q"), bytearray()

    def __len__(self) -> int:
        """Named blocks."""
        return sum(chain.length - chain.start for chain in self._chains.values())

    def names(self) -> set[int]:
        """Of all named blocks, for audits."""
        chains = self._chains.values()
        return {key for chain in chains for key in chain.session.names(chain.start, chain.length)}

    def admit(self, job: Job) -> bool:
        """Take a job's blocks; False, changing nothing, where there is no room for all of it."""
        turn = job.turn
        session = turn.session
        shared, own = self._find(session)
        cached = revived = 0
        if shared is not None:
            cached, revived = shared.length, shared.length - shared.held
        if cached < len(session.shared):
            own = None  # a block before it is missing
        elif own is not None:
            cached, revived = own.length, revived + own.length - own.held
        fresh = -(-(turn.prompt_tokens + turn.output_tokens) // BLOCK_TOKENS) - cached
        busy = self.busy + fresh + revived
        if busy > self._blocks:
            return False
        if shared is not None:
            job.shared_pin = self._hold(shared)
        if own is not None:
            job.own_pin = self._hold(own)
        self.busy = busy
        job.unnamed, job.cached_tokens = fresh, cached * BLOCK_TOKENS
        job.left = turn.prompt_tokens - job.cached_tokens
        job.planned = job.cached_tokens
        if self._idle + busy > self._blocks:
            self._evict(self._idle + busy - self._blocks)
        return True

    def name(self, job: Job, blocks: int) -> None:
        """The first blocks of a job are full; one that is there twice stays unnamed."""
        session = job.turn.session
        common = len(session.shared)
        if job.shared_pin < min(blocks, common):
            shared = self._chain(session.shared[0], session, 0)
            if shared.length == job.shared_pin:
                job.shared_pin = self._extend(shared, job, job.shared_pin, min(blocks, common))
        if blocks > max(job.own_pin, common):
            own = self._chain(-1 - session.number, session, common)
            if own.length == (job.own_pin or common):
                job.own_pin = self._extend(own, job, job.own_pin, blocks)

    def release(self, job: Job) -> None:
        """The job has ended: what it held is idle or free."""
        self.busy -= job.unnamed
        shared, own = self._find(job.turn.session)
        if own is not None and job.own_pin:
            self._let_go(own, job.own_pin)
        if shared is not None and job.shared_pin:
            self._let_go(shared, job.shared_pin)

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

    def _find(self, session: Session) -> tuple[_Chain | None, _Chain | None]:
        chains = self._chains
        shared = chains.get(session.shared[0]) if session.shared else None
        return shared, chains.get(-1 - session.number)

    def _chain(self, name: int, session: Session, start: int) -> _Chain:
        chain = self._chains.get(name)
        if chain is None:
            chain = self._chains[name] = _Chain(name, session, start)
        return chain

    def _hold(self, chain: _Chain) -> int:
        """Hold all of it; the first block beyond."""
        end = chain.length
        chain.pins[end] = chain.pins.get(end, 0) + 1
        if chain.held < end:
            for age, _, _ in chain.idle:
                del self._ages[age]
            chain.idle.clear()
            self._idle -= end - chain.held
            chain.held = end
        return end

    def _extend(self, chain: _Chain, job: Job, pin: int, end: int) -> int:
        """A job that holds all of it has more."""
        if self._told:
            self._keys.extend(chain.session.names(chain.length, end))
            self._added.extend(b"\1" * (end - chain.length))
        job.unnamed -= end - chain.length
        if pin:
            self._unpin(chain, pin)
        chain.pins[end] = 1
        chain.length = chain.held = end
        return end

    def _unpin(self, chain: _Chain, pin: int) -> None:
        chain.pins[pin] -= 1
        if not chain.pins[pin]:
            del chain.pins[pin]

    def _let_go(self, chain: _Chain, pin: int) -> None:
        """What nobody else holds of it is idle, and the most recently used."""
        self._unpin(chain, pin)
        held = max(chain.pins, default=chain.start)
        if held < chain.held:
            self._age += 1
            self._ages[self._age] = chain
            chain.idle.append([self._age, held, chain.held])
            self._idle += chain.held - held
            self.busy -= chain.held - held
            chain.held = held

    def _evict(self, count: int) -> None:
        self._idle -= count
        while count:
            chain = next(iter(self._ages.values()))
            segment = chain.idle[0]
            taken = min(count, segment[2] - segment[1])
            segment[2] -= taken
            if self._told:
                names = chain.session.names(segment[2], chain.length)
                names.reverse()
                self._keys.extend(names)
                self._added.extend(bytes(taken))
            chain.length = segment[2]
            count -= taken
            if segment[1] == segment[2]:
                del chain.idle[0]
                self._ages.popitem(last=False)
                if chain.length == chain.start:
                    del self._chains[chain.name]
