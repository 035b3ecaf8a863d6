"""The journal on disk: an SQLite file in WAL mode, written as a log.

A row of `log` is what one commit brought, of however many requests: one insertion at the end of
one table, whatever the number of streams. A request that ends becomes one row of `finished`, where
it waits for callers who ask again. When the log has grown well past what still runs, all that runs
is written anew as one row and the rows before it go.

SQLite ends a torn transaction by the checksums of its WAL; what was committed is there.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from phalanx.protos.errors import ConfigError, JournalLost

from .owner import Owner, open_folder
from .records import Entry, Kept, decode_entries, decode_kept, encode_entries

APPLICATION_ID = 0x50484C58
SCHEMA_VERSION = 1
MIN_LOG_BYTES = 2**20
WAL_LIMIT_BYTES = 2**24
PRUNE_ROWS = 64

Sync = Literal["normal", "full"]

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE log (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE finished (
    number INTEGER PRIMARY KEY, tenant TEXT NOT NULL, request_id TEXT NOT NULL,
    at REAL NOT NULL, size INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE UNIQUE INDEX finished_by_name ON finished (tenant, request_id);
CREATE INDEX finished_by_time ON finished (at);
INSERT INTO meta VALUES ('epoch', 0);
"""
_APPEND = "INSERT INTO log (data) SELECT ? FROM meta WHERE key = 'epoch' AND value = ?"


@dataclass(slots=True)
class _Live:
    header: bytes
    chunks: list[bytes] = field(default_factory=list)
    size: int = 0


class JournalFile:
    """An opened journal. `write` and `prune` belong to one thread, `find` to one other.

    epoch: counts the owners that this journal has had; what an earlier one still tries to write
    is refused.
    """

    def __init__(
        self, folder: Path, *, sync: Sync = "normal", wait_s: float = 0.0, own: bool = False
    ) -> None:
        """wait_s: seconds to wait for another owner to end. own: nobody has chosen this folder, so
        what another model has left unfinished here is dropped. Raises `ConfigError` for a journal
        that is owned, foreign, damaged, or of another version; nothing is changed then."""
        self._folder, self._own = open_folder(folder), own
        self.epoch: int = -1
        self.next_number: int = 1
        self._log_bytes = self._finished_bytes = 0
        self._owner = Owner(self._folder, wait_s)
        try:
            self._write = self._open(sync)
            self._live = self._load()
            self._read = self._connect()
        except sqlite3.DatabaseError as error:
            self._owner.release()
            raise ConfigError(f"journal {self._path}: cannot be read: {error}") from None
        except BaseException:
            self._owner.release()
            raise

    @property
    def _path(self) -> Path:
        return self._folder / "journal.sqlite3"

    @property
    def unfinished(self) -> list[Kept]:
        """The requests that were accepted and have not ended, the oldest first."""
        return [
            decode_kept(number, live.header, live.chunks)
            for number, live in sorted(self._live.items())
        ]

    # --- opening ---

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5)

    def _open(self, sync: Sync) -> sqlite3.Connection:
        # SQLite gives its other files the mode of this one
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = self._connect()
        known = self._pragma(connection, "application_id")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and known != APPLICATION_ID:
            raise ConfigError(f"journal {self._path}: is a database of another software")
        version = self._pragma(connection, "user_version")
        if tables and version != SCHEMA_VERSION:
            raise ConfigError(
                f"journal {self._path}: has version {version}, this software knows {SCHEMA_VERSION}"
            )
        [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise ConfigError(f"journal {self._path}: is damaged: {verdict}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {sync.upper()}")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")
        connection.execute("PRAGMA secure_delete = ON")  # it held what users wrote
        if not tables:
            connection.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
                f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        return connection

    @staticmethod
    def _pragma(connection: sqlite3.Connection, name: str) -> int:
        return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

    def _load(self) -> dict[int, _Live]:
        live: dict[int, _Live] = {}
        for row, data in self._write.execute("SELECT id, data FROM log ORDER BY id"):
            self._log_bytes += len(data)
            try:
                entries = decode_entries(data)
                for entry in entries:
                    _apply(live, entry)
            except (ValueError, KeyError):
                text = f"journal {self._path}: is damaged: row {row} of its log is no entry"
                raise ConfigError(text) from None
        last, size = self._write.execute(
            "SELECT coalesce(max(number), 0), coalesce(sum(size), 0) FROM finished"
        ).fetchone()
        self.next_number = max([last, *live]) + 1
        self._finished_bytes = size
        return live

    def adopt(self, model: str) -> None:
        """Become the owner, for requests of this model.

        Raises `ConfigError` if another model has left requests here: its tokens are not ours. In a
        folder that nobody has chosen they are dropped.
        """
        row = self._write.execute("SELECT value FROM meta WHERE key = 'model'").fetchone()
        if row is not None and row[0] != model:
            if self._live and not self._own:
                raise ConfigError(
                    f"journal {self._path}: holds {len(self._live)} unfinished requests of "
                    f"{row[0]}, this is {model}; serve that model, or take another folder"
                )
            self._write.execute("DELETE FROM finished")
            self._write.execute("DELETE FROM log")
            self._live.clear()
            self._log_bytes = self._finished_bytes = 0
        self._write.execute("BEGIN IMMEDIATE")
        self._write.execute("INSERT OR REPLACE INTO meta VALUES ('model', ?)", (model,))
        self._write.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
        [self.epoch] = self._write.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
        self._write.execute("COMMIT")

    # --- writing ---

    @property
    def size(self) -> int:
        """Bytes that the journal keeps, of running and of finished requests."""
        return self._log_bytes + self._finished_bytes

    def write(self, entries: Sequence[Entry], now: float) -> None:
        """Make these entries durable, together. now: of the wall clock.

        Raises `JournalLost` when another owner has taken over, `sqlite3.Error` when the disk
        refuses; nothing is written then.
        """
        data = encode_entries(entries)
        ended = list(self._ended(entries, now))
        if not ended:
            self._append(data)
        else:
            with self._transaction():
                self._append(data)
                self._write.executemany(
                    "INSERT OR REPLACE INTO finished VALUES (?, ?, ?, ?, ?, ?)", ended
                )
        self._log_bytes += len(data)
        self._finished_bytes += sum(len(item[5]) for item in ended)
        for entry in entries:
            _apply(self._live, entry)
        kept = sum(live.size for live in self._live.values())
        if self._log_bytes > max(MIN_LOG_BYTES, 4 * kept):
            self._rewrite()

    def _append(self, data: bytes) -> None:
        if self._write.execute(_APPEND, (data, self.epoch)).rowcount != 1:
            raise JournalLost(f"journal {self._path}: another controller has taken it over")

    def _transaction(self) -> _Transaction:
        return _Transaction(self._write)

    def _ended(
        self, entries: Iterable[Entry], now: float
    ) -> Iterable[tuple[int, str, str, float, int, bytes]]:
        """Rows of `finished` for the requests that these entries end."""
        news: dict[int, list[Entry]] = {}
        for entry in entries:
            news.setdefault(entry.number, []).append(entry)
        for number, items in news.items():
            if not items[-1].over:
                continue
            known = self._live.get(number)
            header = known.header if known else next((i.header for i in items if i.header), b"")
            chunks = [*(known.chunks if known else ()), *(c for item in items for c in item.chunks)]
            if not chunks or not header:
                continue  # it was refused: nobody has seen anything of it
            names = decode_kept(number, header, ()).header
            data = encode_entries([Entry(number, header, chunks)])
            yield number, names.tenant, names.request_id, now, len(data), data

    def _rewrite(self) -> None:
        """Write all that runs as one row, and drop the rows before it."""
        whole = [Entry(number, item.header, item.chunks) for number, item in self._live.items()]
        data = encode_entries(whole)
        with self._transaction():
            self._append(data)
            self._write.execute("DELETE FROM log WHERE id < (SELECT max(id) FROM log)")
        self._log_bytes = len(data)

    def prune(self, before: float, max_bytes: int) -> None:
        """Forget requests that ended before that time, and the oldest ones beyond the size."""
        self._drop("at < ?", before)
        while self._finished_bytes > max_bytes:
            oldest = f"SELECT number FROM finished ORDER BY at LIMIT {PRUNE_ROWS}"
            if not self._drop(f"number IN ({oldest}) AND ? IS NOT NULL", before):
                return

    def _drop(self, which: str, value: float) -> int:
        rows = self._write.execute(
            f"DELETE FROM finished WHERE {which} RETURNING size", (value,)
        ).fetchall()
        self._finished_bytes -= sum(size for (size,) in rows)
        return len(rows)

    # --- reading ---

    def find(self, tenant: str, request_id: str) -> Kept | None:
        """A finished request that is still kept."""
        row = self._read.execute(
            "SELECT data FROM finished WHERE tenant = ? AND request_id = ?", (tenant, request_id)
        ).fetchone()
        if row is None:
            return None
        [entry] = decode_entries(row[0])
        return decode_kept(entry.number, entry.header, entry.chunks)

    def close(self) -> None:
        """Give the journal back."""
        self._read.close()
        self._write.close()
        self._owner.release()


class _Transaction:
    """All of it or nothing."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._connection.in_transaction:
            self._connection.execute("COMMIT" if kind is None else "ROLLBACK")


def _apply(live: dict[int, _Live], entry: Entry) -> None:
    """Raises `KeyError` for events of a request that is not known."""
    if entry.header:
        live[entry.number] = _Live(entry.header, size=len(entry.header))
    if entry.over:
        live.pop(entry.number, None)
        return
    request = live[entry.number]
    request.chunks += entry.chunks
    request.size += sum(map(len, entry.chunks))
