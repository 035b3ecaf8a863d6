"""Who owns which slot of the state pool: running sequences, and states kept for later ones.

A state space carries one state a sequence instead of keys and values of each token. So a prefix
can be taken up again only where its state was kept: a snapshot, in a slot of its own. As with
blocks, the ranks execute plans in order, so a released slot may be handed out at once. The rows of
one plan they execute in any order: a slot that one of them reads or writes is nobody else's to write
before the next plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from phalanx.protos.steps import NO_STATE, StateSave, StateUse

from .blocks import BlockPool, require

Key = bytes | int
"""Of a snapshot: the digest of its prefix, or the attempt whose forks will begin from it."""


class StateSlots:
    """The slots of one replica. Each is free, held by a running sequence, or a snapshot.

    Whoever runs holds one slot. What is left holds snapshots, of which the least recently used
    give way to running sequences and to newer ones.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"{num_slots} slots for states: at least 1 is needed")
        self._pool = BlockPool(num_slots)
        self._working: dict[int, int] = {}
        self._source: dict[int, int] = {}
        """Slots that sequences begin from, until their first row is planned."""
        self._snapshots: OrderedDict[Key, int] = OrderedDict()
        self._written: dict[Key, int] = {}
        """Snapshots that the plan in the making takes."""
        self._read: set[int] = set()
        """Slots of snapshots that it begins from."""

    @property
    def num_slots(self) -> int:
        """Slots in all."""
        return self._pool.num_blocks

    @property
    def sequences(self) -> frozenset[int]:
        """The sequences that hold a slot, for audits."""
        return frozenset(self._working)

    @property
    def has_room(self) -> bool:
        """Whether one more sequence can be given a slot."""
        return self._pool.num_free > 0 or not self._read.issuperset(self._snapshots.values())

    def holds(self, key: Key) -> bool:
        """Whether there is a snapshot that can be begun from."""
        return key in self._snapshots

    def open(self, seq: int, source: Key | None) -> None:
        """Give a sequence a slot, its states to begin as the snapshot `source` or as zeros.

        Precondition: `has_room`. The slot may be that of the snapshot itself.
        """
        begin = NO_STATE
        if source is not None:
            self._snapshots.move_to_end(source)
            begin = self._snapshots[source]
        slot = self._take()
        require(slot is not None, f"no slot for the states of sequence {seq}")
        self._working[seq] = NO_STATE if slot is None else slot
        self._source[seq] = begin
        self._read |= {begin} - {slot, NO_STATE}

    def use(self, seq: int, wanted: Iterable[tuple[int, Key]]) -> StateUse:
        """What a row of the sequence does with slots.

        wanted: (tokens of the row, key of the snapshot behind them), by rising tokens. What there
        is no slot for is left out.
        """
        saves = []
        for tokens, key in wanted:
            if key in self._snapshots:
                self._snapshots.move_to_end(key)
            elif key not in self._written and (slot := self._take()) is not None:
                self._written[key] = slot
                saves.append(StateSave(tokens, slot))
        slot = self._working[seq]
        return StateUse(self._source.pop(seq, slot), slot, saves)

    def settle(self) -> None:
        """The plan is made: what it saves can be begun from by the next one."""
        self._snapshots.update(self._written)
        self._written.clear()
        self._read.clear()

    def release(self, seq: int) -> None:
        """Take a sequence's slot away, and what was kept for its forks."""
        self._source.pop(seq, None)
        self._free(self._working.pop(seq))
        self.forget(seq)

    def forget(self, key: Key) -> None:
        """Drop a snapshot, if there is one."""
        slot = self._snapshots.pop(key, None)
        if slot is not None:
            self._free(slot)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every slot is accounted for exactly once. O(slots)."""
        require(not self._written and not self._read, "a plan that is not made")
        require(self._source.keys() <= self._working.keys(), "a source without a sequence")
        forks = {key for key in self._snapshots if isinstance(key, int)}
        require(forks <= self._working.keys(), "a state is kept for forks of nobody")
        held = [*self._working.values(), *self._snapshots.values()]
        free = self._pool.free_blocks()
        for slot in range(self.num_slots):
            states = (slot in free) + held.count(slot)
            require(states == 1, f"slot {slot} is in {states} states")

    def _take(self) -> int | None:
        """A slot, a snapshot's if no other is free."""
        if not self._pool.num_free:
            # few are read by one plan, and they are among the last
            unread = (key for key, slot in self._snapshots.items() if slot not in self._read)
            key = next(unread, None)
            if key is None:
                return None
            self.forget(key)
        return self._pool.take()

    def _free(self, slot: int) -> None:
        self._pool.drop(slot)
        self._pool.free(slot)
