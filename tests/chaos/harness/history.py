"""What clients saw, and the judgement over it: a pure function, tested by itself.

A record is what one reader got of one request, piece by piece. `judge` compares the records of a
run with those of an undisturbed one, and with what is left of the cluster afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]
Answer = Mapping[int, tuple[Tokens, str]]
"""Sample index to its tokens and its end."""


@dataclass(frozen=True)
class Piece:
    """Some tokens of one sample, as a message brought them."""

    at: float
    """Of the reader's monotonic clock, seconds."""
    sample: int
    first: int
    """Index of the first token."""
    tokens: Tokens


@dataclass(frozen=True)
class End:
    """The last word on one sample: a finish reason."""

    at: float
    sample: int
    reason: str


@dataclass
class Record:
    """One reader's view of one request."""

    request: int
    """Which request of the load it is."""
    samples: int = 1
    asked_at: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    closed_at: float | None = None
    """When the stream was over, well or not."""
    error: str = ""
    """The status that ended it; empty where it ended well."""
    refused: bool = False
    """The server said no before it took the request: nothing was promised."""
    left: bool = False
    """The reader went away by itself."""

    def answer(self) -> dict[int, tuple[Tokens, str]]:
        """Tokens and end of each sample, whatever the order of the pieces."""
        tokens: dict[int, Tokens] = {index: () for index in range(self.samples)}
        for piece in self.pieces:
            tokens[piece.sample] = tokens.get(piece.sample, ()) + piece.tokens
        ends = {end.sample: end.reason for end in self.ends}
        return {index: (ids, ends.get(index, "")) for index, ids in tokens.items()}

    def longest_gap(self) -> float:
        """Seconds, the longest wait between two messages of the stream."""
        times = [self.asked_at, *sorted({piece.at for piece in self.pieces})]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


@dataclass(frozen=True)
class Remains:
    """What is left of a cluster when nothing runs."""

    blocks_total: int = 0
    blocks_free: int = 0
    processes: tuple[str, ...] = ()
    """Of a cluster that has ended."""
    segments: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One thing that must not be. kind: lost, duplicated, skipped, changed, ended-twice, open,
    after-end, refused-late, blocks, processes, segments, sockets."""

    kind: str
    request: int | None
    text: str


def judge(
    records: Iterable[Record],
    reference: Mapping[int, Answer] | None = None,
    remains: Remains | None = None,
) -> list[Fault]:
    """Everything that is wrong. reference: the answer of each request in an undisturbed run."""
    faults: list[Fault] = []
    for record in records:
        faults += _judge_ends(record)
        faults += _judge_order(record)
        if reference is not None and not record.refused:
            faults += _judge_tokens(record, reference[record.request])
    return faults + ([] if remains is None else _judge_remains(remains))


def _judge_ends(record: Record) -> list[Fault]:
    """Exactly one terminal state for each sample, and none for what was refused."""

    def fault(kind: str, text: str) -> Fault:
        return Fault(kind, record.request, text)

    faults = []
    if record.refused:
        if record.pieces or record.ends:
            faults.append(fault("refused-late", "it was refused after it had begun"))
        return faults
    if record.left:
        return faults
    if record.closed_at is None:
        faults.append(fault("open", "its stream never ended"))
    if record.error:
        faults.append(fault("lost", f"it ended with {record.error}"))
    for index in range(record.samples):
        ends = [end for end in record.ends if end.sample == index]
        if len(ends) > 1:
            reasons = ", ".join(end.reason for end in ends)
            faults.append(fault("ended-twice", f"sample {index}: {reasons}"))
        if not ends and not record.error and record.closed_at is not None:
            faults.append(fault("lost", f"sample {index} has no end"))
    strange = {item.sample for item in [*record.pieces, *record.ends]} - set(range(record.samples))
    faults += [fault("changed", f"sample {index} was not asked for") for index in sorted(strange)]
    return faults


def _judge_order(record: Record) -> list[Fault]:
    """Indexes 0 to n - 1, each once, in order; nothing after the end."""
    faults: list[Fault] = []
    seen: dict[int, int] = {}
    ended = {end.sample: end.at for end in record.ends}
    for piece in record.pieces:
        due = seen.get(piece.sample, 0)
        where = f"sample {piece.sample}: token {piece.first} came, {due} was due"
        if piece.first < due:
            faults.append(Fault("duplicated", record.request, where))
        if piece.first > due:
            faults.append(Fault("skipped", record.request, where))
        if piece.tokens and piece.at > ended.get(piece.sample, piece.at):
            faults.append(Fault("after-end", record.request, f"sample {piece.sample}"))
        seen[piece.sample] = max(due, piece.first + len(piece.tokens))
    return faults


def _judge_tokens(record: Record, expected: Answer) -> list[Fault]:
    """The tokens and ends of the undisturbed run; a reader that left has a beginning of them."""
    faults = []
    for index, (tokens, reason) in record.answer().items():
        wanted, end = expected.get(index, ((), ""))
        whole = not record.left and not record.error and record.closed_at is not None
        same = tokens == wanted if whole else tokens == wanted[: len(tokens)]
        if not same:
            place = next(
                (
                    i
                    for i, pair in enumerate(zip(tokens, wanted, strict=False))
                    if len(set(pair)) > 1
                ),
                min(len(tokens), len(wanted)),
            )
            text = f"sample {index} differs from token {place} on: {len(tokens)}, {len(wanted)}"
            faults.append(Fault("changed", record.request, text))
        elif whole and reason != end:
            text = f"sample {index} ended by {reason!r}, undisturbed by {end!r}"
            faults.append(Fault("changed", record.request, text))
    return faults


def _judge_remains(remains: Remains) -> list[Fault]:
    faults = []
    if remains.blocks_free != remains.blocks_total:
        held = remains.blocks_total - remains.blocks_free
        faults.append(Fault("blocks", None, f"{held} of {remains.blocks_total} are held"))
    for kind in ("processes", "segments", "sockets"):
        faults += [Fault(kind, None, item) for item in getattr(remains, kind)]
    return faults


def reference_of(runs: Sequence[Sequence[Record]]) -> dict[int, Answer]:
    """The answers of undisturbed runs of one load, which must agree. Raises `ValueError`."""
    answers = [{record.request: record.answer() for record in run} for run in runs]
    faults = [fault for run in runs for fault in judge(run)]
    if faults:
        raise ValueError(f"an undisturbed run is not right: {faults[:3]}")
    if any(other != answers[0] for other in answers[1:]):
        raise ValueError("undisturbed runs differ from each other")
    return dict(answers[0])


def bound(failures: int, trials: int) -> float:
    """The rate below which the true one lies with 95 % certainty, as seen so many times.

    No failure: the rule of three. Else the upper end of Wilson's interval.
    """
    if trials == 0:
        return 1.0
    if failures == 0:
        return min(3.0 / trials, 1.0)
    rate, z = failures / trials, 1.645
    middle = rate + z * z / (2 * trials)
    spread = z * ((rate * (1 - rate) + z * z / (4 * trials)) / trials) ** 0.5
    return min((middle + spread) / (1 + z * z / trials), 1.0)
