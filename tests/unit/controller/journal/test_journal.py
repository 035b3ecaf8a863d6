"""The journal on disk: what was released is there, whatever happened to the process."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phalanx.controller.journal.file import JournalFile
from phalanx.controller.journal.memory import MemoryJournal
from phalanx.controller.journal.records import Entry, Header, Kept, encode_events, encode_header
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.protos.errors import ConfigError, InvalidArgument, JournalLost, RequestFailed
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import PromptLogprobs, SampledToken, TokenLogprob


def header(name: str = "a", **fields: Any) -> Header:
    values: dict[str, Any] = {
        "tenant": "red",
        "request_id": name,
        "fingerprint": b"f" * 32,
        "prompt_token_ids": [1, 2, 3],
        "params": SamplingParams(seed=7, n=2, stop=("x",), logit_bias={5: 1.5}),
        "arrival": 1.0,
        "deadline": 2.5,
    }
    return Header(**(values | fields))


def event(first: int, finish: FinishReason | None = None, **fields: Any) -> TokenEvent:
    tokens = (SampledToken(0, 100 + first),)
    values: dict[str, Any] = {"request_id": "", "sample_index": 0, "tokens": tokens}
    return TokenEvent(**(values | {"first_index": first, "finish": finish} | fields))


def opened(folder: Path, **options: Any) -> JournalFile:
    file = JournalFile(folder, **options)
    file.adopt("model")
    return file


def begin(number: int, name: str, **fields: Any) -> Entry:
    return Entry(number, encode_header(header(name, **fields)))


def more(number: int, *events: TokenEvent, over: bool = False) -> Entry:
    return Entry(number, b"", [encode_events(events)] if events else [], over)


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    score = TokenLogprob(4, -0.25, 1)
    events = [
        event(0, prompt_logprobs=PromptLogprobs(0, 1, [score], [[score]]), cached_prompt_tokens=2),
        event(1, tokens=(SampledToken(0, 9, score, [score, score]),), stop_token=9),
        event(0, FinishReason.ERROR, tokens=(), error=RequestFailed("broken"), sample_index=1),
    ]
    file = opened(tmp_path / "journal")
    file.write([begin(1, "a"), more(1, *events[:2])], 0.0)
    file.write([begin(2, "b", deadline=None), more(2, events[2], over=True)], 5.0)
    file.close()
    file = opened(tmp_path / "journal")
    assert file.unfinished == [Kept(1, header("a"), events[:2])]
    found = file.find("red", "b")
    assert found is not None
    assert found.header == header("b", deadline=None)
    assert (type(found.events[0].error), str(found.events[0].error)) == (RequestFailed, "broken")
    assert file.find("blue", "b") is None
    assert file.next_number == 3
    file.close()


def test_nobody_else_may_look_inside(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    file = opened(folder)
    file.write([begin(1, "a")], 0.0)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    file.close()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0755.*allowed is 0700"):
        JournalFile(folder)


def test_the_second_owner_is_told_the_name_of_the_first_or_waits(tmp_path: Path) -> None:
    first = opened(tmp_path / "journal")
    before = time.monotonic()
    with pytest.raises(ConfigError, match=rf"belongs to process {os.getpid()} on \S+ since 20"):
        JournalFile(tmp_path / "journal", wait_s=0.2)
    assert time.monotonic() >= before + 0.2
    first.close()
    opened(tmp_path / "journal", wait_s=0.2).close()


def test_an_owner_that_was_overtaken_writes_nothing(tmp_path: Path) -> None:
    """As on a file system whose locks do not hold."""
    first = opened(tmp_path / "journal")
    first.write([begin(1, "a")], 0.0)
    (tmp_path / "journal" / "owner").unlink()
    second = opened(tmp_path / "journal")
    for entries in ([more(1, event(0))], [more(1, event(0, FinishReason.STOP), over=True)]):
        with pytest.raises(JournalLost, match="taken it over"):
            first.write(entries, 0.0)
    assert [kept.events for kept in second.unfinished] == [[]]
    second.write([more(1, event(0, FinishReason.STOP), over=True)], 0.0)
    first.close()
    second.close()


def _text(path: Path) -> None:
    path.write_bytes(b"these are notes, and no journal" * 100)


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (a)")


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")


def _torn_row(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE log SET data = substr(data, 1, length(data) - 3)")


def _bent_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 2000] = b"\xff" * 2000
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_text, "not a database"),
        (_foreign, "another software"),
        (_newer, "has version 99, this software knows 1"),
        (_torn_row, "row 1 of its log"),
        (_bent_page, "damaged|malformed"),
    ],
)
def test_what_is_no_journal_is_refused_and_left_alone(
    tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "journal"
    path = folder / "journal.sqlite3"
    if harm in (_text, _foreign):
        folder.mkdir(mode=0o700)
    else:
        file = opened(folder)
        file.write([begin(1, "a"), more(1, event(0))], 0.0)
        file.close()
    harm(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=said):
        JournalFile(folder)
    assert path.read_bytes() == before


def test_requests_of_another_model_are_not_taken_up(tmp_path: Path) -> None:
    file = opened(tmp_path / "journal")
    file.write([begin(1, "a"), begin(2, "b"), more(2, event(0, FinishReason.STOP), over=True)], 0)
    file.close()
    file = JournalFile(tmp_path / "journal")
    with pytest.raises(ConfigError, match="1 unfinished requests of model, this is other"):
        file.adopt("other")
    file.adopt("model")
    file.write([more(1, over=True)], 0)
    file.close()
    file = JournalFile(tmp_path / "journal")
    file.adopt("other")
    assert file.find("red", "b") is None
    file.close()


def test_ended_requests_go_by_age_and_by_size(tmp_path: Path) -> None:
    file = opened(tmp_path / "journal")
    for number in range(1, 201):
        end = event(0, FinishReason.STOP)
        file.write([begin(number, str(number)), more(number, end, over=True)], float(number))
    file.prune(51.0, 2**30)
    assert [file.find("red", str(number)) is not None for number in (1, 50, 51, 200)] == [
        False,
        False,
        True,
        True,
    ]
    file.prune(0.0, 4000)
    assert file.find("red", "200") is not None
    assert file.find("red", "60") is None
    kept = sum(file.find("red", str(number)) is not None for number in range(1, 201))
    assert 0 < kept < 100
    file.close()


def test_the_log_stays_small_while_one_request_runs_and_many_end(tmp_path: Path) -> None:
    """Bounded by what runs and what is kept, not by what has passed through."""
    file = opened(tmp_path / "journal")
    file.write([begin(1, "long")], 0.0)
    prompt = list(range(2000))
    for number in range(2, 1500):
        events = [event(0, FinishReason.LENGTH)]
        file.write([begin(number, str(number), prompt_token_ids=prompt)], 0.0)
        file.write([more(number, *events, over=True), more(1, event(number - 2))], 0.0)
        file.prune(0.0, 100_000)
    assert file.size < 2**21
    on_disk = sum(path.stat().st_size for path in (tmp_path / "journal").iterdir())
    file.close()
    file = opened(tmp_path / "journal")
    [kept] = file.unfinished
    assert [item.first_index for item in kept.events] == list(range(1498))
    assert on_disk < 12 * 2**20
    file.close()


WRITER = """
import sys
from pathlib import Path
from phalanx.controller.journal.file import JournalFile
from phalanx.controller.journal.records import *
from phalanx.controller.scheduling.request import *
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.steps import SampledToken

file = JournalFile(Path(sys.argv[1]), wait_s=10)
file.adopt("model")
known = {kept.number: len(kept.events) for kept in file.unfinished}
for number in range(file.next_number, 9):
    header = Header(tenant="t", request_id=str(number), fingerprint=b"", deadline=None,
        prompt_token_ids=list(range(300)), params=SamplingParams(), arrival=0.0)
    file.write([Entry(number, encode_header(header))], 0.0)
    known[number] = 0
print("begun", flush=True)
while True:
    entries = []
    for number, count in known.items():
        token = SampledToken(0, number * 100000 + count)
        event = TokenEvent(request_id="", sample_index=0, first_index=count, tokens=(token,))
        entries.append(Entry(number, b"", [encode_events([event])]))
        known[number] += 1
    file.write(entries, 0.0)
    print(min(known.values()), flush=True)
"""


def test_what_a_killed_writer_had_released_is_there(tmp_path: Path) -> None:
    """SIGKILL at random moments, over and over: in commits, checkpoints and rewritings."""
    chance = random.Random(5)
    released = 0
    for turn in range(6):
        folder = tmp_path / f"journal-{turn // 3}"
        released *= turn % 3 > 0
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(chance.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        for line in process.stdout:
            if line.endswith("\n"):
                released = max(released, int(line))
        process.wait()
        file = opened(folder)
        unfinished = file.unfinished
        assert len(unfinished) == 8
        for kept in unfinished:
            indexes = [item.first_index for item in kept.events]
            assert indexes == list(range(len(indexes)))
            assert len(indexes) >= released
            for item in kept.events:
                assert item.tokens[0].token_id == kept.number * 100000 + item.first_index
        file.close()
    assert released > 20


class JournalMachine(RuleBasedStateMachine):
    """Any order of news, commits, losses of the process, and prunings, against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "journal"
        self._file = opened(self._path)
        self._number = 0
        self._live: dict[int, list[int]] = {}
        self._ended: dict[int, list[int]] = {}
        self._batch: list[Entry] = []
        self._after: list[Callable[[], Any]] = []
        self._counts: dict[int, int] = {}

    @rule(size=st.integers(1, 30000))
    def begin(self, size: int) -> None:
        self._number += 1
        number = self._number
        entry = begin(number, str(number), prompt_token_ids=[1] * size)
        self._batch.append(entry)
        self._counts[number] = 0
        self._after.append(lambda: self._live.__setitem__(number, []))

    @precondition(lambda self: self._counts)
    @rule(data=st.data(), over=st.booleans())
    def say(self, data: st.DataObject, over: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self._counts)))
        count = self._counts[number]
        finish = FinishReason.STOP if over else None
        self._batch.append(more(number, event(count, finish), over=over))
        self._counts[number] += 1
        if over:
            del self._counts[number]

        def durable() -> None:
            self._live[number].append(count)
            if over:
                self._ended[number] = self._live.pop(number)

        self._after.append(durable)

    @rule()
    def commit(self) -> None:
        if self._batch:
            self._file.write(self._batch, 0.0)
            for function in self._after:
                function()
            self._batch, self._after = [], []

    @rule()
    def lose_the_process(self) -> None:
        self._file.close()
        self._batch, self._after = [], []
        self._file = opened(self._path)
        self._counts = {number: len(indexes) for number, indexes in self._live.items()}

    @invariant()
    def the_books_agree(self) -> None:
        unfinished = {
            kept.number: [item.first_index for item in kept.events]
            for kept in self._file.unfinished
        }
        assert unfinished == self._live
        for number, indexes in self._ended.items():
            found = self._file.find("red", str(number))
            assert found is not None
            assert [item.first_index for item in found.events] == indexes

    def teardown(self) -> None:
        self._file.close()
        self._folder.cleanup()


JournalMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, database=None
)
TestJournalMachine = JournalMachine.TestCase


def test_in_memory_ended_requests_go_by_age_and_by_size() -> None:
    journal = MemoryJournal(keep_s=1000.0, keep_bytes=2000)
    for name in map(str, range(100)):
        number = journal.begin(header(name))
        journal.append(number, [event(0, FinishReason.STOP)], over=True, then=lambda: None)
    assert journal.find("red", "99") == Kept(100, header("99"), [event(0, FinishReason.STOP)])
    assert journal.find("red", "0") is None
    assert journal.find("blue", "99") is None
    assert MemoryJournal(keep_s=-1.0).find("red", "99") is None


def test_errors_come_back_as_their_kind(tmp_path: Path) -> None:
    file = opened(tmp_path / "journal")
    error = InvalidArgument.of("prompt", "is too long")
    file.write([begin(1, "a"), more(1, event(0, FinishReason.ERROR, error=error), over=True)], 0)
    found = file.find("red", "a")
    assert found is not None
    assert isinstance(found.events[0].error, InvalidArgument)
    assert "is too long" in str(found.events[0].error)
    file.close()
