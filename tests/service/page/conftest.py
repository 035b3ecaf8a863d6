"""The page beside the gRPC server, on the same scripted engine, and a browser to look at it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from phalanx.controller.cluster.snapshot import ClusterSnapshot
from phalanx.controller.metrics import Metrics
from phalanx.controller.page.figures import Figures
from phalanx.controller.page.host import PageHost

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BLOCKS = bytes([0] * 12 + [1] * 20 + [2] * 6 + [3] * 2)


class Watched:
    """A cluster of one ready replica with the KV blocks `BLOCKS`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def snapshot(self) -> ClusterSnapshot:
        found = self._engine.snapshot()
        replica = dataclasses.replace(
            found.replicas[0],
            running_requests=3,
            kv_blocks_total=40,
            kv_blocks_free=32,
            kv_blocks_cached=20,
            kv_block_tokens=16,
        )
        return dataclasses.replace(found, replicas=(replica,))

    def block_maps(self) -> dict[str, bytes]:
        return {"replica-0": BLOCKS}

    def ask_block_maps(self) -> None:
        return None


@dataclass
class Page:
    """A page that is served; `http` knows its address, and no token."""

    served: Any
    host: PageHost
    figures: Figures
    http: aiohttp.ClientSession


@pytest.fixture
def page(serve: Any) -> Callable[..., Any]:
    """Factory: `async with page(script, **host_options) as made`."""

    @contextlib.asynccontextmanager
    async def start(script: Any, **options: Any) -> AsyncIterator[Page]:
        async with serve(script) as served:
            figures = Figures(Metrics())
            host = PageHost(served.service, Watched(served.engine), figures, **options)
            await host.start()
            try:
                async with aiohttp.ClientSession(base_url=host.url) as http:
                    yield Page(served, host, figures, http)
            finally:
                await host.stop()

    return start


@pytest.fixture
def endless_script() -> Any:
    """Says a letter every few milliseconds, until aborted or closed."""

    async def script(submission: Any) -> AsyncIterator[list[Any]]:
        for first in range(100_000):
            yield [submission.event([50], first)]
            await asyncio.sleep(0.005)

    return script


class Tab:
    """One tab of a browser, by its debugging protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        """Errors of scripts, and what the browser logged: refused loads, for example."""

    async def listen(self) -> None:
        async for frame in self._socket:
            message = json.loads(frame.data)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            elif message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(message["params"]))

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        message = await asyncio.wait_for(answer, 60)
        assert "error" not in message, (method, message)
        return dict(message["result"])

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str) -> Any:
        """The expression's value once it is true."""
        for _ in range(600):
            if value := await self.run(script):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"{script} never held")

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def key(self, key: str, text: str = "") -> None:
        """Press and release a key."""
        code = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39}.get(key, 0)
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **shared)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **shared)


@pytest.fixture
def browser() -> Callable[..., Any]:
    """Factory: `async with browser() as tab`, a headless browser of its own."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed: one of {', '.join(BROWSERS)}")

    @contextlib.asynccontextmanager
    async def start() -> AsyncIterator[Tab]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            process = await asyncio.create_subprocess_exec(
                *(program, "--headless=new", "--disable-gpu", "--no-first-run"),
                *(["--no-sandbox"] if os.geteuid() == 0 else []),
                *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
                stderr=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
            )
            try:
                async with asyncio.timeout(60), aiohttp.ClientSession() as session:
                    port = await _debugging_port(process)
                    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                        tabs = await answer.json(content_type=None)
                [target] = [tab for tab in tabs if tab["type"] == "page"]
                async with (
                    aiohttp.ClientSession() as session,
                    session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket,
                ):
                    tab = Tab(socket)
                    listening = asyncio.create_task(tab.listen())
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.call(f"{domain}.enable")
                    yield tab
                    listening.cancel()
            finally:
                process.terminate()
                await process.wait()

    return start


async def _debugging_port(process: asyncio.subprocess.Process) -> int:
    assert process.stderr is not None
    async for line in process.stderr:
        if found := re.search(rb"ws://[^/]+:(\d+)/", line):
            return int(found[1])
    raise AssertionError("the browser ended")
