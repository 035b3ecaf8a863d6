"""Requests wander between two schedulers in random histories: no token is lost or changed, no
block is freed while a transfer reads or writes it, and none is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phalanx.controller.scheduling.request import Request
from phalanx.protos.errors import TransferFailed
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.transfers import NO_BLOCK, Exchange, Take, Taken

EXCHANGE = Exchange(0, b"", 1, 1, [("", 0), ("", 0)])
RANKS = 2
"""One has the blocks; the other only answers."""


class Machine(RuleBasedStateMachine):
    def __init__(
        self, make_loop: Any, make_stream: Any, make_side: Any, make_transfer: Any
    ) -> None:
        super().__init__()
        self.make_loop, self.make_stream = make_loop, make_stream
        self.make_side, self.make_transfer = make_side, make_transfer
        self.streams: dict[tuple[str, int], Any] = {}
        self.home: dict[str, tuple[Any, str]] = {}
        """Request to its replica and its name there."""
        self.transfers: list[Any] = []
        self.moved = self.count = 0

    @initialize(
        num_blocks=st.integers(4, 40),
        other_blocks=st.integers(4, 40),
        block_size=st.integers(1, 4),
        max_running=st.integers(1, 5),
        max_in_flight=st.integers(1, 3),
        prefix_caching=st.booleans(),
    )
    def start(self, num_blocks: int, other_blocks: int, block_size: int, **config: Any) -> None:
        config |= {"max_context": 40, "max_tokens_per_step": 8, "reserve_tokens": 1}
        self.sides = [
            self.make_side(self.make_loop(blocks, block_size, **config))
            for blocks in (num_blocks, other_blocks)
        ]

    @rule(rounds=st.integers(1, 8), lazy=st.sampled_from([None, None, 0, 1]))
    def go_on(self, rounds: int, lazy: int | None) -> None:
        """Everybody does something, one side perhaps nothing but what it is told."""
        for _ in range(rounds):
            for side in (0, 1):
                if side != lazy:
                    self.plan(side)
                self.execute(side)
                self.update(side)
            for back in range(2):
                self.copy(back, 3)
                self.other_rank(back, False)
                if any(not t.over for t in self.transfers):
                    self.advance(back)

    @precondition(lambda self: self.live)
    @rule(
        back=st.integers(0, 4),
        stop=st.sampled_from([40, 40, 1, 2, 3, 5]),
        quick=st.booleans(),
    )
    def hand_over(self, back: int, stop: int, quick: bool) -> None:
        """From the offer on, up to some point."""
        for side in (0, 1):
            self.step(side, 2)
        if not self.live:
            return
        known = len(self.transfers)
        self.offer(back)
        if len(self.transfers) > known:
            self.drive(stop, quick)

    @precondition(lambda self: self.streams)
    @rule(side=st.integers(0, 1), back=st.integers(0, 4), stop=st.sampled_from([40, 40, 2, 4]))
    def copy_prefix(self, side: int, back: int, stop: int) -> None:
        """The same for a prefix."""
        known = len(self.transfers)
        self.offer_prefix(side, back)
        if len(self.transfers) > known:
            self.drive(stop, False)

    def drive(self, stop: int, quick: bool) -> None:
        for _ in range(stop):
            if self.transfers[-1].over:
                break
            for side in (0, 1):
                self.plan(side)
                self.execute(side)
                if quick:
                    self.execute(side)
                self.update(side)
            self.copy(0, 20 if quick else 2)
            self.other_rank(0, False)
            if not self.transfers[-1].over:
                self.advance(0)

    # --- requests ---

    @rule(
        side=st.integers(0, 1),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.integers(6, 28),
        ignore_eos=st.sampled_from([True, True, True, False]),
    )
    def add(self, side: int, prompt: list[int], n: int, max_tokens: int, ignore_eos: bool) -> None:
        chosen = self.sides[side]
        room = min(each.scheduler.max_context for each in self.sides)
        if len(prompt) + max_tokens > room:
            return
        self.count += 1
        base = f"r{self.count}"
        params = SamplingParams(n=n, max_tokens=max_tokens, seed=self.count, ignore_eos=ignore_eos)
        for index in range(n):
            request = Request(
                request_id=base,
                sample_index=index,
                prompt_token_ids=list(prompt),
                params=params,
                arrival=0.0,
            )
            self.streams[base, index] = self.make_stream(request)
        self.place(base, chosen)

    def group(self, base: str, name: str) -> list[Request]:
        """The open samples, from where they stand."""
        return [
            dataclasses.replace(
                stream.request, request_id=name, output_token_ids=list(stream.tokens)
            )
            for (known, _), stream in self.streams.items()
            if known == base and stream.finish is None
        ]

    def place(self, base: str, side: Any) -> None:
        name = f"{base}.{self.moved}"
        self.moved += 1
        self.home[base] = side, name
        side.scheduler.add(self.group(base, name), readmitted=True)

    def feed(self, side: Any, events: Any) -> None:
        current = {name: base for base, (home, name) in self.home.items() if home is side}
        for event in events:
            if (base := current.get(event.request_id)) is not None:
                # a request that is computed anew finds its prompt cached a second time
                self.streams[base, event.sample_index].feed(
                    dataclasses.replace(event, cached_prompt_tokens=0)
                )

    @property
    def live(self) -> list[str]:
        """Requests that have not ended."""
        return list({base: None for (base, _), s in self.streams.items() if s.finish is None})

    @precondition(lambda self: self.live)
    @rule(back=st.integers(0, 4), sample=st.sampled_from([None, 0, 1]), seldom=st.integers(0, 3))
    def abort(self, back: int, sample: int | None, seldom: int) -> None:
        if seldom:
            return
        side, name = self.home[self.pick(self.live, back)]
        self.feed(side, side.scheduler.abort(name, sample))

    @staticmethod
    def pick(among: list[Any], back: int) -> Any:
        return among[max(len(among) - 1 - back, 0)]

    # --- loops and ranks, each at its own pace ---

    @rule(side=st.integers(0, 1), steps=st.integers(1, 6))
    def step(self, side: int, steps: int) -> None:
        for _ in range(steps):
            self.plan(side)
            while self.sides[side].inbox:
                self.execute(side)
            self.update(side)

    @rule(side=st.integers(0, 1))
    def plan(self, side: int) -> None:
        self.sides[side].plan()

    @rule(side=st.integers(0, 1))
    def execute(self, side: int) -> None:
        if self.sides[side].inbox:
            self.sides[side].execute()

    @rule(side=st.integers(0, 1))
    def update(self, side: int) -> None:
        chosen = self.sides[side]
        if chosen.results:
            self.feed(chosen, chosen.scheduler.update(chosen.results.popleft()))

    # --- the mover ---

    @precondition(lambda self: self.live)
    @rule(back=st.integers(0, 4))
    def offer(self, back: int) -> None:
        base = self.pick(self.live, back)
        side, name = self.home[base]
        other = self.sides[self.sides[0] is side]
        if any(t.base == base and not t.over for t in self.transfers):
            return
        transfer = self.make_transfer(len(self.transfers), side, other, base)
        try:
            outline, message = side.scheduler.departures.offer(transfer.number, name)
        except TransferFailed:
            return
        transfer.outline = outline
        side.inbox.append(message)
        self.transfers.append(transfer)

    @precondition(lambda self: self.streams)
    @rule(side=st.integers(0, 1), back=st.integers(0, 4))
    def offer_prefix(self, side: int, back: int) -> None:
        prompt = self.pick(list(self.streams.values()), back).request.prompt_token_ids
        source, target = self.sides[side], self.sides[1 - side]
        transfer = self.make_transfer(len(self.transfers), source, target)
        try:
            transfer.outline, message = source.scheduler.departures.offer_prefix(
                transfer.number, "default", prompt
            )
        except TransferFailed:
            return
        source.inbox.append(message)
        self.transfers.append(transfer)

    @precondition(lambda self: any(not t.over for t in self.transfers))
    @rule(back=st.integers(0, 3))
    def advance(self, back: int) -> None:
        """The next thing that the mover would do."""
        transfer = self.pick([t for t in self.transfers if not t.over], back)
        arrivals, number = transfer.target.scheduler.arrivals, transfer.number
        try:
            if not transfer.reserved:
                reserve = arrivals.reserve if transfer.base else arrivals.reserve_prefix
                message = reserve(number, transfer.outline, EXCHANGE, RANKS)
                transfer.target.inbox.append(message)
                transfer.reserved = True
            elif not transfer.base:
                if arrivals.arrived(number, 0, RANKS) is not None:
                    arrivals.keep_prefix(number)
                    self.end(transfer)
            elif not transfer.frozen:
                if arrivals.arrived(number, 0, RANKS) is not None:
                    tail = arrivals.tail_blocks(transfer.outline)
                    freeze = transfer.source.scheduler.departures.freeze
                    transfer.source.inbox.append(freeze(number, tail))
                    transfer.frozen = True
            else:
                self.pass_on(transfer)
        except TransferFailed:
            self.end(transfer)

    def pass_on(self, transfer: Any) -> None:
        settled = transfer.source.scheduler.departures.settled(transfer.number)
        arrived = transfer.target.scheduler.arrivals.arrived(transfer.number, 1, RANKS)
        if settled is None or arrived is None:
            return
        if not settled:
            raise TransferFailed("all of it has ended")
        base, (side, old) = transfer.base, self.home[transfer.base]
        name = f"{base}.{self.moved}"
        self.moved += 1
        self.home[base] = transfer.target, name
        side.scheduler.abort(old)
        group = self.group(base, name)
        try:
            transfer.target.scheduler.adopt(transfer.number, group, settled)
        except TransferFailed:
            transfer.target.scheduler.add(group, readmitted=True)
            raise
        finally:
            self.end(transfer)

    @precondition(lambda self: any(not t.over for t in self.transfers))
    @rule(back=st.integers(0, 3), seldom=st.integers(0, 3))
    def cancel(self, back: int, seldom: int) -> None:
        """It took too long, or somebody has failed; at any point."""
        if seldom == 0:
            self.end(self.pick([t for t in self.transfers if not t.over], back))

    def end(self, transfer: Any) -> None:
        if transfer.over:
            return
        transfer.over = True
        message = transfer.source.scheduler.departures.withdraw(transfer.number)
        if message is not None:
            transfer.source.inbox.append(message)
        transfer.target.scheduler.arrivals.give_up(transfer.number)

    # --- the copying ranks ---

    @rule(back=st.integers(0, 3), blocks=st.integers(1, 20))
    def copy(self, back: int, blocks: int) -> None:
        """Some blocks of a transfer that both ranks have heard of."""
        under_way = [t for t in self.transfers if t.number in t.target.takes and t.said[0] < 2]
        if not under_way:
            return
        transfer = self.pick(under_way, back)
        take = transfer.target.takes[transfer.number]
        for _ in range(blocks):
            found = transfer.source.offered.get((transfer.number, transfer.part))
            if found is None:
                if transfer.over and not transfer.source.inbox:
                    # withdrawn; what was on its way may still be written
                    self.write(transfer, take, [None] * transfer.source.rank.block_size)
                    self.say(transfer, 0, "withdrawn")
                return
            if transfer.copied == len(found):
                self.say(transfer, 0)
                return
            if found[transfer.copied] != NO_BLOCK:
                self.write(transfer, take, transfer.source.rank.pool[found[transfer.copied]])
            transfer.copied += 1

    def write(self, transfer: Any, take: Take, content: list[Any]) -> None:
        part = take.parts[transfer.part]
        if transfer.copied < len(part) and part[transfer.copied] != NO_BLOCK:
            transfer.target.rank.pool[part[transfer.copied]] = list(content)

    def say(self, transfer: Any, rank: int, error: str = "") -> None:
        last = len(transfer.target.takes[transfer.number].parts) - 1
        part = min(transfer.said[rank], last)
        message = Taken(transfer.number, part, 7, error)
        transfer.said[rank] = 2 if error or part == last else 1
        if rank == 0:
            transfer.part, transfer.copied = transfer.part + 1, 0
        transfer.target.scheduler.arrivals.taken(rank, message)

    @rule(back=st.integers(0, 3), fails=st.sampled_from([False, False, False, False, True]))
    def other_rank(self, back: int, fails: bool) -> None:
        """It is done with what the first one is done with, or fails."""
        waited = [t for t in self.transfers if t.number in t.target.takes and t.said[1] < 2]
        waited = [t for t in waited if fails or t.said[0] > t.said[1] or t.said[0] == 2]
        if waited:
            self.say(self.pick(waited, back), 1, "broken" if fails else "")

    @invariant()
    def books_agree(self) -> None:
        for side in getattr(self, "sides", ()):
            side.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "sides"):
            return
        for transfer in self.transfers:
            self.end(transfer)
        for _ in range(2000):
            for side in (0, 1):
                self.step(side, 1)
            for back in range(len(self.transfers)):
                self.copy(back, 20)
                self.other_rank(back, False)
            busy = any(side.scheduler.has_work or side.results for side in self.sides)
            if not busy and not any(len(side.scheduler.arrivals) for side in self.sides):
                break
        for side in self.sides:
            side.scheduler.check_integrity()
            assert not side.scheduler.has_work, "a sample did not end"
            assert not len(side.scheduler.arrivals) and not len(side.scheduler.departures)
            assert side.cache.num_free == side.cache.num_blocks, "a block was left behind"
        for stream in self.streams.values():
            assert stream.finish is not None
            stream.check(40)


def test_requests_that_wander_get_the_tokens_of_a_lone_run(
    make_loop: Callable[..., Any], caller: Any, copying_ranks: tuple[Any, Any]
) -> None:
    run_state_machine_as_test(
        lambda: Machine(make_loop, caller, *copying_ranks),
        settings=settings(
            max_examples=150,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
