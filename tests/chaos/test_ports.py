"""What listens, what strangers may say to it, and what comes out: tests 20, 38, 39 and 40."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness.load import begin
from harness.running import idle
from harness.scenarios import SHM, Load
from harness.server import SERVE, Server, Topology

from phalanx.controller.client import AsyncClient

LOAD = Load(8, 48)
LOUD = 10
"""Lines a second, from which on a log is flooded."""


def speak(address: str, port: int, data: bytes) -> None:
    """Say something to a port, and listen for a moment."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1) as link:
        link.settimeout(0.05)
        link.sendall(data)
        link.recv(1000)


def greeting() -> bytes:
    """The first message of TLS."""
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(inward, outward, server_hostname="x")
    with contextlib.suppress(ssl.SSLError):
        tls.do_handshake()
    return outward.read()


def bombs(canary: Path, draw: random.Random) -> list[bytes]:
    """Things that no port of ours should take, among them pickles that would make a file."""
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    pickled = pickle.dumps(Bomb())
    return [
        pickled,
        len(pickled).to_bytes(4, "little") + pickled,
        len(pickled).to_bytes(8, "big") + pickled,
        b"\xff\xff\xff\x7f",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + draw.randbytes(200),
        greeting(),
        *(draw.randbytes(draw.randrange(1, 3000)) for _ in range(6)),
    ]


async def pester(server: Server, reference: Any, name: str, canary: Path, idlers: int) -> int:
    """Bytes and half-open connections to every port while streams run; how many ports."""
    asks, answers = reference
    draw, line, began = random.Random(name), len(server.said), time.monotonic()
    ports = sorted({(host if host != "0.0.0.0" else "127.0.0.1", port)
                    for host, port, _ in server.listeners() if ":" not in host})  # fmt: skip
    async with AsyncClient(server.address, timeout=120) as client:
        reading = begin(client, asks, name)
        links = []
        for index in range(idlers):
            with contextlib.suppress(OSError):
                links.append(socket.create_connection(ports[index % len(ports)], 1))
        for address, port in ports:
            for data in bombs(canary, draw):
                await asyncio.to_thread(speak, address, port, data)
        records = await reading.finish()
        for link in links:
            link.close()
        assert {record.request: record.answer() for record in records} == answers
        remains = await idle(client)
        assert remains.blocks_free == remains.blocks_total
    lines = [text for _, text in server.said[line:]]
    assert len(lines) <= LOUD * (time.monotonic() - began), lines[:5]
    assert not [text for text in lines if "replica-" in text], lines[:5]
    return len(ports)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "idlers",
    [
        pytest.param(50, marks=pytest.mark.bar(20, 39)),
        pytest.param(1000, marks=[pytest.mark.bar(20, 39), pytest.mark.chaos]),
    ],
)
def test_garbage_on_every_port_changes_nothing(
    clusters: Any, tmp_path: Path, idlers: int, report: Any
) -> None:
    """Nor does any of it run: the pickles would leave a file."""
    reference = clusters.reference(SHM, LOAD)
    server, canary = clusters.get(SHM), tmp_path / "canary"
    count = asyncio.run(pester(server, reference, clusters.name(), canary, idlers))
    report.note(20, "garbage", ports=count, idle_connections=idlers)
    assert count >= 2
    assert not canary.exists()


@pytest.mark.bar(38)
def test_all_that_listens_listens_here_alone(clusters: Any) -> None:
    """The service, the metrics page, the ranks' links, and all of Ray's."""
    server = clusters.get(SHM)
    ours = {int(server.address.rpartition(":")[2]), int(server.metrics.split(":")[2].split("/")[0])}
    found = server.listeners()
    assert ours < {port for _, port, _ in found}
    assert {"raylet", "gcs_server"} < {name for _, _, name in found}
    assert {host.removeprefix("::ffff:") for host, _, _ in found} == {"127.0.0.1"}, found


@pytest.mark.bar(38)
def test_an_open_address_without_credentials_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SERVE, "serve", "smollm2", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "tls_cert" in done.stderr and "0.0.0.0" in done.stderr


MARKER = "xyzzyplughmarker"


async def two_tenants(server: Server) -> None:
    """What one tenant has computed is not in the other's cache, as far as usage tells."""
    prompt = f"{MARKER} the lighthouse keeper counted the ships " * 3
    cached: dict[str, list[int]] = {}
    for tenant in ("red", "red", "blue", "blue", "red"):
        async with AsyncClient(server.address, token=tenant, timeout=60) as client:
            answer = await client.complete(prompt, max_tokens=2, temperature=0.0, ignore_eos=True)
            cached.setdefault(tenant, []).append(answer.usage.cached_prompt_tokens)
    assert cached["red"][0] == cached["blue"][0] == 0
    assert min(cached["red"][1:] + cached["blue"][1:]) > 0


@pytest.mark.bar(40)
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_tenants_share_no_prefix_and_logs_hold_no_prompt(clusters: Any, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    names = ("red", "blue")
    tokens.write_text(
        "".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in names)
    )
    os.chmod(tokens, 0o600)
    topology = Topology(flags=("--token-file", str(tokens), "--log-level", "debug"))
    server = clusters.get(topology)
    try:
        asyncio.run(two_tenants(server))
        logs = [text for _, text in server.said]
        session = Path("/tmp/ray/session_latest/logs")
        logs += [path.read_text(errors="replace") for path in session.glob("*") if path.is_file()]
        assert not [text for text in logs if MARKER in text]
    finally:
        clusters.close()
