"""What the journal holds: requests as they were accepted, and the events of their samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
import msgspec

from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.controller.tools.formats import Reading
from phalanx.protos.errors import PhalanxError
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.status import decode
from phalanx.protos.steps import PromptLogprobs, SampledToken


class Header(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """An accepted request. Times are seconds of the wall clock, which outlives the process."""

    tenant: str
    request_id: str
    fingerprint: bytes
    """Of the caller's message: the same body has the same one."""
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float
    deadline: float | None
    tools: Reading | None = None
    """How calls of tools are read from the answer."""
    priority: int = 0


class _Error(msgspec.Struct, frozen=True, array_like=True):
    status: str
    text: str


class _Event(msgspec.Struct, frozen=True, array_like=True):
    sample: int
    first: int
    tokens: Sequence[SampledToken]
    finish: FinishReason | None
    stop_token: int | None
    error: _Error | None
    cached: int
    prompt: PromptLogprobs | None


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """News of one request: it began, events came, it is over; or, again, all that is known."""

    number: int
    header: bytes = b""
    """Of a request that begins."""
    chunks: list[bytes] = []
    """Runs of events."""
    over: bool = False
    """It has ended, or was refused: nothing more will come."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A request with all of its events."""

    number: int
    header: Header
    events: list[TokenEvent]


_events = msgspec.msgpack.Decoder(list[_Event])
_headers = msgspec.msgpack.Decoder(Header)
_entries = msgspec.msgpack.Decoder(list[Entry])
_encoder = msgspec.msgpack.Encoder()


def encode_header(header: Header) -> bytes:
    """For `Entry.header`."""
    return _encoder.encode(header)


def encode_events(events: Iterable[TokenEvent]) -> bytes:
    """For `Entry.chunks`."""
    return _encoder.encode([_packed(event) for event in events])


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """One row of the log."""
    return _encoder.encode(entries)


def decode_entries(data: bytes) -> list[Entry]:
    """Raises `ValueError` for bytes that are no row."""
    return _entries.decode(data)


def decode_kept(number: int, header: bytes, chunks: Iterable[bytes]) -> Kept:
    """Raises `ValueError` for bytes that are no header or no events."""
    events = [_unpacked(item) for chunk in chunks for item in _events.decode(chunk)]
    return Kept(number, _headers.decode(header), events)


def _packed(event: TokenEvent) -> _Event:
    error = None if event.error is None else _Error(event.error.status, str(event.error))
    return _Event(
        event.sample_index,
        event.first_index,
        event.tokens,
        event.finish,
        event.stop_token,
        error,
        event.cached_prompt_tokens,
        event.prompt_logprobs,
    )


def _unpacked(item: _Event) -> TokenEvent:
    return TokenEvent(
        request_id="",
        sample_index=item.sample,
        first_index=item.first,
        tokens=tuple(item.tokens),
        finish=item.finish,
        stop_token=item.stop_token,
        error=None if item.error is None else _raised(item.error),
        cached_prompt_tokens=item.cached,
        prompt_logprobs=item.prompt,
    )


def _raised(error: _Error) -> PhalanxError:
    return decode(grpc.StatusCode[error.status], error.text, ())
