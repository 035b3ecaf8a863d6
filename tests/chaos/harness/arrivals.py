"""Requests by the thousand for a hundredth of a core: a process of its own that writes HTTP/2 itself.

The machine that is overloaded also runs the clients. A gRPC library takes as long to be refused as the
server to refuse, which would be measured as the server's. This one sends the same bytes with another
stream id, looks at status and retry time, and leaves messages unread until all is over.

    python arrivals.py ADDRESS < Plan as JSON > Outcome as JSON
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

PATH = b"/phalanx.v1.InferenceService/Generate"
HEAD = struct.Struct(">I")
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
STATUS, PUSHBACK, DETAILS = b"grpc-status", b"grpc-retry-pushback-ms", b"grpc-status-details-bin"
EXHAUSTED = b"8"
GRANTED = 1 << 30
SENT = 65535
QUIET_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What is sent."""

    body: str
    """A message as it is on the wire, hexadecimal."""
    seconds: float
    rate: float = 0.0
    """Poisson arrivals a second."""
    open: int = 0
    """In place of a rate: so many at a time, each followed by the next when it is done."""
    retries: int = 0
    """After a refusal, so many tries more at once."""
    seed: int = 0
    token: str = ""
    """Whose requests they are, where the server asks."""


@dataclass
class Outcome:
    """What became of it. Times in seconds."""

    asked: int = 0
    """Calls, tries included."""
    done: int = 0
    """Ended with OK."""
    done_s: float = 0.0
    """From the first call to the last end with OK."""
    in_time: int = 0
    """Of those that are done: while calls were being sent."""
    refused_s: list[float] = field(default_factory=list)
    """From each refusal's call to its status."""
    told_ms: list[int] = field(default_factory=list)
    """What refusals said of when to come back; -1: nothing."""
    detailed: int = 0
    """Refusals with details of the status, where RetryInfo is."""
    others: dict[str, int] = field(default_factory=dict)
    """Ends of other kinds: a status, a reset stream, a connection that was closed."""
    answers: dict[str, int] = field(default_factory=dict)
    """Bodies of those that are done, hexadecimal, and how often each came."""
    late_s: float = 0.0
    """By which a call was sent too late, at most."""
    cpu_s: float = 0.0
    """Of this process."""


class Connection:
    """HTTP/2 as far as it is needed here. Nothing is compressed, so every header is what it says."""

    def __init__(self, address: str, body: bytes, token: str = "") -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fields = (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", PATH),
            (b":authority", address.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *([(b"authorization", f"Bearer {token}".encode())] if token else []),
        )
        self._block = b"".join(
            bytes((0, len(name))) + name + bytes((len(value),)) + value for name, value in fields
        )
        self._message = b"\0" + HEAD.pack(len(body)) + body
        self._streams = itertools.count(1, 2)
        self._in = bytearray()
        self._unread, self._window = 0, SENT
        settings = struct.pack(">HIHI", 1, 0, 4, GRANTED)
        start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings)
        self._socket.sendall(start + frame(WINDOW, 0, 0, HEAD.pack(GRANTED)))

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_window(self) -> bool:
        """Whether the server lets us send one more request."""
        return self._window > len(self._message)

    def ask(self) -> int:
        """Send the request once more; the stream's id."""
        stream = next(self._streams)
        self._window -= len(self._message)
        self._socket.sendall(
            frame(HEADERS, END_HEADERS, stream, self._block)
            + frame(DATA, END_STREAM, stream, self._message)
        )
        return stream

    def read(self) -> Iterator[tuple[int, int, int, bytes]]:
        """(kind, flags, stream, payload) of what streams were told. Raises `EOFError`."""
        part = self._socket.recv(1 << 18)
        if not part:
            raise EOFError
        self._in += part
        at, data = 0, self._in
        while len(data) >= at + 9:
            size = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            if len(data) < at + 9 + size:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = HEAD.unpack_from(data, at + 5)[0] & 0x7FFFFFFF
            payload = bytes(data[at + 9 : at + 9 + size])
            at += 9 + size
            if not self._serve(kind, flags, stream, payload):
                yield kind, flags, stream, payload
        del data[:at]

    def _serve(self, kind: int, flags: int, stream: int, payload: bytes) -> bool:
        """What is the connection's own affair."""
        if kind == DATA:
            self._unread += len(payload)
            if self._unread > GRANTED // 2:
                self._socket.sendall(frame(WINDOW, 0, 0, HEAD.pack(self._unread)))
                self._unread = 0
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self._socket.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind == WINDOW and stream == 0:
            self._window += HEAD.unpack(payload)[0]
        elif kind == GOAWAY:
            raise EOFError
        return kind in (SETTINGS, PING, WINDOW)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    return HEAD.pack(len(payload) << 8 | kind) + bytes((flags,)) + HEAD.pack(stream) + payload


def headers(block: bytes) -> dict[bytes, bytes]:
    """Fields whose name is written out; values that are Huffman-coded stay so (RFC 7541)."""
    at, found = 0, {}

    def number(bits: int) -> int:
        nonlocal at
        most = (1 << bits) - 1
        value, shift = block[at] & most, 0
        at += 1
        if value == most:
            while True:
                byte = block[at]
                at += 1
                value += (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
        return value

    def text() -> bytes:
        nonlocal at
        size = number(7)
        at += size
        return block[at - size : at]

    while at < len(block):
        first = block[at]
        if first & 0x80:
            number(7)
        elif first & 0xE0 == 0x20:
            number(5)
        elif number(6 if first & 0x40 else 4):
            text()
        else:
            name = text()
            found[name] = text()
    return found


@dataclass(slots=True)
class Call:
    began: float
    tries: int
    body: bytearray = field(default_factory=bytearray)


class Load:
    """A plan on its way."""

    def __init__(self, plan: Plan, connection: Connection) -> None:
        self._plan, self._connection = plan, connection
        self.outcome = Outcome()
        self._calls: dict[int, Call] = {}
        self._due: list[float] = []
        self._again: deque[int] = deque()
        """Tries left, of calls that are to be sent at once."""
        self._began, self._cpu = time.monotonic(), time.process_time()

    def run(self) -> Outcome:
        """Until all is over."""
        plan, draw = self._plan, random.Random(self._plan.seed)
        self._again.extend([0] * plan.open)
        at = self._began
        while plan.rate and (at := at + draw.expovariate(plan.rate)) < self._began + plan.seconds:
            self._due.append(at)
        heapq.heapify(self._due)
        selector = selectors.DefaultSelector()
        selector.register(self._connection, selectors.EVENT_READ)
        try:
            while self._due or self._again or self._calls:
                self._send()
                wait = self._due[0] - time.monotonic() if self._due else QUIET_S
                if selector.select(max(wait, 0.0)):
                    for item in self._connection.read():
                        self._take(*item)
                elif not self._due:
                    self._note("nothing for a minute", len(self._calls))
                    break
        except (EOFError, OSError):
            self._note("connection closed", len(self._calls))
        self.outcome.cpu_s = time.process_time() - self._cpu
        return self.outcome

    def _send(self) -> None:
        connection = self._connection
        while connection.has_window and (self._again or self._due):
            now = time.monotonic()
            if self._again:
                tries = self._again.popleft()
            elif self._due[0] <= now:
                self.outcome.late_s = max(self.outcome.late_s, now - heapq.heappop(self._due))
                tries = self._plan.retries
            else:
                return
            self.outcome.asked += 1
            self._calls[connection.ask()] = Call(now, tries)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        if kind == DATA:
            call.body += payload
        elif kind == RESET:
            self._end(stream, call, f"RST_STREAM {HEAD.unpack(payload)[0]}")
        elif kind == HEADERS and flags & END_STREAM:
            told = headers(payload)
            status = told.get(STATUS, b"?")
            if status == EXHAUSTED:
                self.outcome.refused_s.append(time.monotonic() - call.began)
                self.outcome.told_ms.append(int(told.get(PUSHBACK, b"-1")))
                self.outcome.detailed += DETAILS in told
            self._end(stream, call, status.decode(errors="replace"))

    def _end(self, stream: int, call: Call, status: str) -> None:
        del self._calls[stream]
        now = time.monotonic()
        if status == "0":
            self.outcome.done += 1
            self.outcome.done_s = now - self._began
            self.outcome.in_time += now < self._began + self._plan.seconds
            name = call.body.hex()
            self.outcome.answers[name] = self.outcome.answers.get(name, 0) + 1
        elif status == EXHAUSTED.decode():
            if call.tries:
                self._again.append(call.tries - 1)
        else:
            self._note(status, 1)
        if self._plan.open and now < self._began + self._plan.seconds:
            self._again.append(0)

    def _note(self, what: str, count: int) -> None:
        self.outcome.others[what] = self.outcome.others.get(what, 0) + count


def carry_out(address: str, message: bytes, **plan: Any) -> Outcome:
    """Carry a plan out, by a process of its own; message: a `GenerateRequest` as it is sent."""
    done = subprocess.run(
        [sys.executable, "-S", "-P", __file__, address],
        input=json.dumps(asdict(Plan(message.hex(), **plan))),
        capture_output=True,
        text=True,
        check=True,
    )
    return Outcome(**json.loads(done.stdout))


def main(arguments: list[str]) -> None:
    plan = Plan(**json.load(sys.stdin))
    load = Load(plan, Connection(arguments[0], bytes.fromhex(plan.body), plan.token))
    made: dict[str, Any] = asdict(load.run())
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
