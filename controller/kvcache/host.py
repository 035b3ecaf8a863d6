"""The slots of host memory: which block is in which, and which may be given up."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator

from .blocks import require


class HostSlots:
    """Slots 0 .. num_slots - 1, the same on every rank.

    A slot is free, holds a digest, or is doomed: forgotten, while ranks still read or write it. A
    pinned slot, which they do, is neither reused nor given up.
    """

    def __init__(self, num_slots: int, on_change: Callable[[bytes], None]) -> None:
        """on_change: told of digests that come and go."""
        self.num_slots, self._on_change = num_slots, on_change
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._pins: Counter[int] = Counter()
        self._doomed: set[int] = set()
        self._clean: OrderedDict[bytes, None] = OrderedDict()
        """What may be given up, the least recently used first: it is on disk, or never will be."""
        self._unwritten: OrderedDict[bytes, None] = OrderedDict()
        """What the disk is to get, the first stored first."""

    def __len__(self) -> int:
        """Digests held."""
        return len(self._slot_of)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._slot_of)

    @property
    def has_room(self) -> bool:
        """Whether `take` finds a slot; it may find one although this is false, as long as
        something is pinned that was there before."""
        return bool(self._free) or len(self._clean) > len(self._pins)

    @property
    def has_unwritten(self) -> bool:
        """Whether anything waits for the disk."""
        return bool(self._unwritten)

    def find(self, digest: bytes) -> int | None:
        """The slot that holds a digest."""
        return self._slot_of.get(digest)

    def touch(self, digest: bytes) -> None:
        """It was wanted again."""
        if digest in self._clean:
            self._clean.move_to_end(digest)

    def take(self, *, at_any_price: bool = False) -> int | None:
        """A slot for something else: a free one, or that of what was least recently used.

        at_any_price: even of a block that should have gone to disk first.
        """
        if self._free:
            return self._free.pop()
        slot = self._give_up(self._clean)
        return self._give_up(self._unwritten) if slot is None and at_any_price else slot

    def _give_up(self, among: Iterable[bytes]) -> int | None:
        oldest = next((held for held in among if self._slot_of[held] not in self._pins), None)
        if oldest is None:
            return None
        slot = self._slot_of.pop(oldest)
        self._unlist(oldest)
        self._on_change(oldest)
        return slot

    def put(self, digest: bytes, slot: int) -> None:
        """A taken slot holds this from now on. It is pinned; `keep` says what becomes of it."""
        self._slot_of[digest] = slot
        self._pins[slot] += 1
        self._on_change(digest)

    def keep(self, digest: bytes, *, write: bool) -> None:
        """What was put is whole. write: the disk is to get it."""
        if digest in self._slot_of:
            self._unlist(digest)
            (self._unwritten if write else self._clean)[digest] = None

    def next_unwritten(self) -> tuple[bytes, int]:
        """What goes to disk next, with its slot, which is pinned now. Precondition: there is one.

        `keep` says what becomes of it.
        """
        digest, _ = self._unwritten.popitem(last=False)
        slot = self._slot_of[digest]
        self._pins[slot] += 1
        return digest, slot

    def give_up_writing(self) -> None:
        """Nothing will be written any more."""
        self._clean |= self._unwritten
        self._unwritten.clear()

    def pin(self, slot: int) -> None:
        """Ranks are about to read the slot."""
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """They have done so, once."""
        self._pins[slot] -= 1
        if not self._pins[slot]:
            del self._pins[slot]
            if slot in self._doomed:
                self._doomed.remove(slot)
                self._free.append(slot)

    def forget(self, digest: bytes) -> None:
        """What is held under this name is broken."""
        slot = self._slot_of.pop(digest, None)
        if slot is None:
            return
        self._unlist(digest)
        if slot in self._pins:
            self._doomed.add(slot)
        else:
            self._free.append(slot)
        self._on_change(digest)

    def _unlist(self, digest: bytes) -> None:
        self._clean.pop(digest, None)
        self._unwritten.pop(digest, None)

    def check_integrity(self, pins: Counter[int]) -> None:
        """Raise `IntegrityError` unless every slot is accounted for and these are the pins."""
        slots = [*self._free, *self._slot_of.values(), *self._doomed]
        require(sorted(slots) == list(range(self.num_slots)), "a slot is lost or twice there")
        require(pins == self._pins, "pins and open moves disagree")
        require(self._doomed <= self._pins.keys(), "a doomed slot is not in use")
        require(self._clean.keys().isdisjoint(self._unwritten), "a block is clean and unwritten")
        listed = self._clean.keys() | self._unwritten.keys()
        require(listed <= self._slot_of.keys(), "a block that is not here may be given up")
        unlisted = (self._slot_of[held] for held in self._slot_of.keys() - listed)
        require(all(slot in self._pins for slot in unlisted), "a block is never given up")
