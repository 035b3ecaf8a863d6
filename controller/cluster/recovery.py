"""What to do next about replicas: a pure function of what is desired, what is there, and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .room import Free, freed, has_room, largest_tp

FIRST_BACKOFF_S = 0.25
LONGEST_BACKOFF_S = 30.0
MEMORY_S = 300.0
"""Failures longer ago than this are forgiven."""
CRASH_LOOP = 5
"""So many failures within `MEMORY_S` make a replica degraded; it is still tried, seldom."""
LIVED_S = 30.0
"""A group that was lost after so long had come up well: the failures before it are forgiven."""
DEGRADED_BACKOFF_S = 60.0
LOOK_AGAIN_S = 0.1
"""Between two looks at the places that are free, where some are missing."""
LOOK_FOR_MORE_S = 2.0
"""The same where a replica runs, but smaller than desired."""
LOOK_AT_SPARES_S = 10.0
"""Between two looks at whether spares still stand."""
STEADY_S = 5.0
"""Places that have come back must stay for so long before a replica grows into them."""
QUIET_WAIT_S = 30.0
"""A replica that never falls quiet grows after so many seconds: its streams move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """What the operator asks for. `placement` is one of Ray's strategies."""

    tp: int = 1
    pp: int = 1
    min_tp: int = 1
    placement: str = "STRICT_PACK"
    shrink_after_s: float = 10.0
    """Places must be missing for so long before a replica starts smaller."""
    generation: int = 0
    """Replicas of an earlier one are to be replaced: a rolling restart."""
    spares: int = 0
    """Groups that stand by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The place of one replica, by its history. Times are of one monotonic clock."""

    running: bool = False
    failures: tuple[float, ...] = ()
    """When its group was lost or did not start, in order; since one has lived for `LIVED_S`."""
    cause: str = ""
    """Of the last failure."""
    begun: float | None = None
    """When the running group was taken in."""
    tp: int = 0
    """Of the running group."""
    places: tuple[str, ...] = ()
    """The nodes of its ranks."""
    generation: int = 0
    since: float | None = None
    """Not running: since when the desired size finds no places. Smaller than desired: since when
    it finds them."""
    refused: tuple[tuple[int, str], ...] = ()
    """TP sizes that did not fit into the memory that there was, and what was said of them."""

    def failed(self, now: float, cause: str) -> Slot:
        """The slot after its group was lost, or did not start."""
        lived = self.begun is not None and now - self.begun >= LIVED_S
        recent = () if lived else tuple(time for time in self.failures if time > now - MEMORY_S)
        failures = (*recent, now)
        return replace(self.stopped(), failures=failures, cause=cause)

    def stopped(self) -> Slot:
        """The slot after its group was ended on purpose."""
        return replace(self, running=False, begun=None, tp=0, places=(), since=None)

    def started(
        self,
        tp: int = 1,
        places: Sequence[str] = (),
        generation: int = 0,
        now: float | None = None,
    ) -> Slot:
        """The slot with a group that is taken in."""
        return replace(
            self,
            running=True,
            begun=now,
            tp=tp,
            places=tuple(places),
            generation=generation,
            since=None,
            refused=(),
        )

    def stumbled(self, now: float, cause: str) -> Slot:
        """The slot whose group runs on, as the one that was to replace it did not start."""
        stopped = replace(self, begun=None).failed(now, cause)
        return replace(self, failures=stopped.failures, cause=cause, since=None)

    def too_small(self, tp: int, cause: str) -> Slot:
        """The slot after the memory plan has refused a size."""
        return replace(self, refused=(*self.refused, (tp, cause)), cause=cause)

    def recent_failures(self, now: float) -> int:
        """Failures that still count."""
        return sum(time > now - MEMORY_S for time in self.failures)

    def degraded(self, now: float) -> bool:
        """Whether starting it again and again has not helped."""
        return not self.running and self.recent_failures(now) >= CRASH_LOOP

    def due(self, now: float) -> float:
        """When it may be started."""
        if not self.failures:
            return now
        if self.degraded(now):
            return self.failures[-1] + DEGRADED_BACKOFF_S
        # the first failure after a quiet time is answered at once
        exponent = self.recent_failures(now) - 2
        wait = 0.0 if exponent < 0 else min(FIRST_BACKOFF_S * 2.0**exponent, LONGEST_BACKOFF_S)
        return self.failures[-1] + wait


@dataclass(frozen=True, slots=True)
class Start:
    """Start a group for this slot now; at this TP size, or as desired."""

    index: int
    tp: int = 1


@dataclass(frozen=True, slots=True)
class Replace:
    """Start another group for a slot whose group runs, and move its streams there.

    beside: there is room for both, so that the old one goes on until the new one is ready.
    """

    index: int
    tp: int
    beside: bool


@dataclass(frozen=True, slots=True)
class AddSpare:
    """Start one more group that stands by."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing may be done for so many seconds, unless something changes; None: for ever."""

    seconds: float | None


Action = Start | Replace | AddSpare | Wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is seen around the slots. free: None where places are not counted, so that there is
    always one. busy: the slots that compute or hold requests. spares: groups that stand by, or
    are about to; spare_places: the nodes of their ranks, places that a group may have."""

    free: Free | None = None
    busy: frozenset[int] = field(default_factory=frozenset)
    spares: int = 0
    spare_places: tuple[str, ...] = ()

    @property
    def room(self) -> Free | None:
        """What a group would find."""
        return None if self.free is None else freed(self.free, self.spare_places)


def needs_room(slots: Sequence[Slot], desired: Desired) -> bool:
    """Whether `Facts.free` matters: a replica is missing, smaller than desired, or outdated, or
    there are spares to keep."""
    return desired.spares > 0 or any(
        not slot.running or slot.tp < desired.tp or slot.generation < desired.generation
        for slot in slots
    )


def observe(slots: Sequence[Slot], now: float, desired: Desired, facts: Facts) -> list[Slot]:
    """The slots, with the time at which places went missing or came back."""
    return [_observe(slot, now, desired, facts.room) for slot in slots]


def _observe(slot: Slot, now: float, desired: Desired, free: Free | None) -> Slot:
    if free is None:
        return slot
    own = freed(free, slot.places) if slot.running else free
    fits = has_room(own, desired.tp, desired.pp, desired.placement)
    if not slot.running and not fits:
        return replace(slot, since=now if slot.since is None else slot.since)
    if slot.running and slot.tp < desired.tp and fits:
        return replace(slot, since=now if slot.since is None else slot.since)
    return slot if slot.since is None else replace(slot, since=None, refused=())


def next_actions(
    slots: Sequence[Slot], now: float, desired: Desired | None = None, facts: Facts | None = None
) -> tuple[Action, ...]:
    """What is to be done, in order; the last one is a `Wait`.

    Missing replicas come first, who is due first before the others, ties to the lowest index: at
    the desired size, or, when that has found no places for `shrink_after_s`, at the largest size
    that does and was not refused for its memory, down to `min_tp`. Then replicas grow that are
    smaller than desired, and then, only when all run, the next one of an earlier generation is
    replaced; spares come last. One group starts at a time, as starting ones compete for the memory that sizing has
    looked at: whoever does the first action asks again.
    """
    desired, facts = desired or Desired(), facts or Facts()
    room = facts.room
    actions: list[Action] = []
    waits: list[float] = []
    missing = [(slot.due(now), index) for index, slot in enumerate(slots) if not slot.running]
    for due, index in sorted(missing):
        tp, wait = _size(slots[index], now, desired, room)
        if due > now:
            waits.append(due - now)
        elif tp:
            actions.append(Start(index, tp))
        else:
            waits.append(wait)
    for index, slot in enumerate(slots):
        if slot.running and slot.tp < desired.tp:
            wait = max(_growth(slot, now, busy=index in facts.busy), slot.due(now) - now)
            waits.append(wait if wait > 0 else LOOK_FOR_MORE_S)
            if wait <= 0:
                actions.append(_replacement(slot, index, desired, room))
    # one at a time, and one that does not come up ends the turn of the others
    outdated = [index for index, slot in enumerate(slots) if slot.generation < desired.generation]
    if outdated and not missing and not actions:
        index = outdated[0]
        if (due := slots[index].due(now)) > now:
            waits.append(due - now)
        else:
            actions.append(_replacement(slots[index], index, desired, room))
    if facts.spares < desired.spares and all(slot.tp == desired.tp for slot in slots):
        waits.append(LOOK_FOR_MORE_S)
        if not actions and _fits(desired, facts.free):
            actions.append(AddSpare())
    elif desired.spares:
        waits.append(LOOK_AT_SPARES_S)
    return (*actions, Wait(min(waits, default=None)))


def _fits(desired: Desired, free: Free | None) -> bool:
    return free is None or has_room(free, desired.tp, desired.pp, desired.placement)


def _size(slot: Slot, now: float, desired: Desired, free: Free | None) -> tuple[int, float]:
    """The TP size to start at; 0: none now, and for how long to wait."""
    if _fits(desired, free):
        return desired.tp, 0.0
    if free is None:
        return 0, LOOK_AGAIN_S
    waited = 0.0 if slot.since is None else now - slot.since
    if waited < desired.shrink_after_s:
        return 0, LOOK_AGAIN_S
    tp = largest_tp(free, desired.tp - 1, desired.pp, desired.placement)
    if tp < desired.min_tp or any(tp <= size for size, _ in slot.refused):
        return 0, LOOK_FOR_MORE_S
    return tp, 0.0


def _growth(slot: Slot, now: float, *, busy: bool) -> float:
    """Seconds until it may grow; 0: now."""
    if slot.since is None:
        return LOOK_FOR_MORE_S
    steady = slot.since + STEADY_S - now
    if steady > 0:
        return steady
    patience = slot.since + STEADY_S + QUIET_WAIT_S - now
    return min(patience, LOOK_AGAIN_S) if busy and patience > 0 else 0.0


def _replacement(slot: Slot, index: int, desired: Desired, free: Free | None) -> Replace:
    """At the desired size if that finds places, else as large as it is."""
    shape = (desired.pp, desired.placement)
    if free is None:
        return Replace(index, desired.tp, beside=False)
    tp = desired.tp if has_room(freed(free, slot.places), desired.tp, *shape) else slot.tp
    return Replace(index, tp, beside=has_room(free, tp, *shape))


def condition(slot: Slot, now: float, desired: Desired) -> str:
    """Why a replica is not as desired, in words for the operator; empty: it is."""
    if slot.running and slot.tp < desired.tp:
        if slot.since is None:
            return f"places for tp {desired.tp} are gone"
        return f"places for tp {desired.tp} are back, grows at a quiet moment"
    if slot.running:
        return "to be restarted" if slot.generation < desired.generation else ""
    if slot.since is not None:
        left = max(slot.since + desired.shrink_after_s - now, 0)
        smaller = desired.min_tp < desired.tp
        later = f", starts smaller in {left:.0f} s" if smaller and left else ""
        refused = f"; {slot.refused[-1][1]}" if slot.refused else ""
        return f"places for tp {desired.tp} are gone{later}{refused}"
    failures = slot.recent_failures(now)
    return f"lost {failures} times, last: {slot.cause}" if failures else ""
