"""Where a server keeps its journal, and when it goes without."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.controller.journal.choosing import default_folder, open_journal
from phalanx.controller.journal.file import JournalFile
from phalanx.controller.journal.records import Entry, Header, encode_header
from phalanx.protos.errors import ConfigError
from phalanx.protos.sampling import SamplingParams


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def opened(journal: str | None, port: int = 50051) -> tuple[JournalFile | None, list[str]]:
    said: list[str] = []
    file = open_journal(journal, port, sync="normal", wait_s=0.0, say=said.append)
    return file, said


def test_nobody_said_anything_so_it_lies_in_the_users_state_by_port(state: Path) -> None:
    file, [said] = opened("auto")
    assert file is not None
    folder = state / "phalanx" / "journal-50051"
    assert (folder / "journal.sqlite3").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert str(folder) in said and "what users write" in said
    other, _ = opened("auto", 50052)
    assert other is not None
    for journal in (file, other):
        journal.close()


def test_a_relative_state_folder_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder(1) == tmp_path / ".local/state/phalanx/journal-1"


@pytest.mark.parametrize(("journal", "port"), [(None, 50051), ("auto", 0)])
def test_there_is_none_where_it_is_off_or_the_port_was_drawn(
    state: Path, journal: str | None, port: int
) -> None:
    assert opened(journal, port) == (None, [])
    assert not state.exists()


def test_one_that_cannot_be_had_is_gone_without_unless_it_was_named(state: Path) -> None:
    state.write_text("no folder")
    file, [said] = opened("auto")
    assert file is None and said.startswith("without a journal: ")
    with pytest.raises(ConfigError):
        opened(str(state))


def test_what_another_model_left_is_dropped_in_a_folder_that_nobody_chose(state: Path) -> None:
    folder = state / "phalanx" / "journal-50051"
    header = Header(
        tenant="t",
        request_id="r",
        fingerprint=b"f",
        prompt_token_ids=[1],
        params=SamplingParams(),
        arrival=0.0,
        deadline=None,
    )
    first = JournalFile(folder)
    first.adopt("first")
    first.write([Entry(1, header=encode_header(header))], 0.0)
    first.close()
    named = JournalFile(folder)
    with pytest.raises(ConfigError, match="unfinished requests of first"):
        named.adopt("second")
    named.close()
    found, _ = opened("auto")
    assert found is not None and len(found.unfinished) == 1
    found.adopt("second")
    assert found.unfinished == []
    found.close()
    again = JournalFile(folder)
    assert again.unfinished == []
    again.close()
