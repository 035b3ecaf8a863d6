"""Frames between the step loop and its ranks: 4 bytes of length (little endian), then msgpack.

Only the record types listed here can come out of a frame; anything else is a `GroupLost`.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from .errors import GroupLost
from .moves import MoveReport
from .specs import LoadReport, WorkerSpec
from .steps import StepPlan, StepResult
from .transfers import Offer, Take, Taken, Withdraw

MAX_FRAME_BYTES = 256 * 1024 * 1024
BEAT_S = 0.5
LAST_WORDS = b"Fatal Python error: "
"""What `faulthandler` writes in place of a frame when its process dies of a signal of its own."""
MAX_LAST_WORDS = 64
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A rank's first words: who it is, and the group's secret."""

    rank: int
    epoch: int
    secret: bytes


class Progress(msgspec.Struct, frozen=True, array_like=True, tag="progress"):
    """How far a rank's loading is, in weight elements."""

    done: int
    total: int


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The rank gives up; `kind` is the name of the error class."""

    kind: str
    message: str


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """A loaded rank's process is alive; sent every `BEAT_S` seconds, whatever it computes."""


class Start(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """What to build; answered by `Progress` and one `LoadReport`."""

    spec: WorkerSpec


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """End in good order."""


FromRank = Hello | Progress | Failed | Beat | LoadReport | StepResult | Taken | MoveReport
ToRank = Start | StepPlan | Stop | Offer | Withdraw | Take

_encoder = msgspec.msgpack.Encoder()
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)


def encode(message: FromRank | ToRank) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise GroupLost("the peer closed its connection")
        parts += part
    return bytes(parts)


def _last_words(connection: socket.socket) -> str:
    """What a process has died of, as far as it came to say it."""
    words, ends = b"", LAST_WORDS[_LENGTH.size :]
    while len(words) < MAX_LAST_WORDS and b"\n" not in words:
        part = connection.recv(MAX_LAST_WORDS)
        if not part:
            break
        words += part
    cause = words.removeprefix(ends).partition(b"\n")[0].decode("ascii", "replace")
    return f"died: {cause.strip() or 'a fatal signal'}"


def _read(connection: socket.socket, limit: int) -> bytes:
    try:
        head = _read_exactly(connection, _LENGTH.size)
        if LAST_WORDS.startswith(head):
            raise GroupLost(_last_words(connection), crashed=True)
        (size,) = _LENGTH.unpack(head)
        if size > limit:
            raise GroupLost(f"a frame of {size} bytes came, at most {limit} are allowed")
        return _read_exactly(connection, size)
    except OSError as error:
        raise GroupLost(f"connection lost: {error.strerror or type(error).__name__}") from error


def read_from_rank(connection: socket.socket, limit: int = MAX_FRAME_BYTES) -> FromRank:
    """The next message of a rank. Raises `GroupLost` on a closed or misspoken connection."""
    try:
        return _from_rank.decode(_read(connection, limit))
    except msgspec.MsgspecError as error:
        raise GroupLost(f"not a rank's message: {error}", crashed=True) from error


def read_to_rank(connection: socket.socket, limit: int = MAX_FRAME_BYTES) -> ToRank:
    """The next message for a rank. Raises `GroupLost` on a closed or misspoken connection."""
    try:
        return _to_rank.decode(_read(connection, limit))
    except msgspec.MsgspecError as error:
        raise GroupLost(f"not the step loop's message: {error}") from error
