"""The page's listener: its files, its policy, its figures, and who may have them."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import aiohttp
import pytest

from phalanx.controller.observing import StepTimes
from phalanx.controller.page.files import read_files
from phalanx.controller.page.host import PageHost
from phalanx.controller.page.state import MAX_CELLS, cells
from phalanx.protos.errors import ConfigError

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


async def event(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next event of a stream."""
    line = await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 30)
    assert line.startswith(b"data: ")
    return dict(json.loads(line[6:]))


def test_the_page_loads_nothing_from_elsewhere(page: Any, say: Any) -> None:
    async def main() -> None:
        async with page(say([50])) as made, made.http.get("") as answer:
            text = await answer.text()
            policy = answer.headers["Content-Security-Policy"]
            rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
            assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'"
            assert "unsafe" not in policy and "http" not in policy
            assert rules["require-trusted-types-for"] == "'script'"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            for name in re.findall(r'(?:src|href)="([^"#]+)"', text):
                async with made.http.get(name) as part:
                    assert part.status == 200, name
                    assert part.headers["Content-Security-Policy"] == policy

    asyncio.run(main())


def test_no_file_makes_markup_of_texts_or_names_another_site() -> None:
    files = read_files()
    assert {"/", "/style.css", "/app.js", "/icon.svg"} <= files.keys()
    for path, file in files.items():
        text = file.content.decode()
        sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function"
        assert re.findall(sinks, text) == [], path
        outside = set(re.findall(r"https?://[^\s\"'<>)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert outside == set(), path
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert f"/{module}" in files, path


@pytest.mark.parametrize(
    "path",
    [
        "/../host.py",
        "/static/app.js",
        "/%2e%2e/host.py",
        "/..%2fhost.py",
        "//etc/passwd",
        "/app.js/../../host.py",
        "/index.html",
        "/api/../host.py",
    ],
)
def test_only_the_table_of_files_is_served(page: Any, say: Any, path: str) -> None:
    async def main() -> None:
        async with page(say([50])) as made:
            port = int(made.host.url.rstrip("/").rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await asyncio.wait_for(reader.read(), 30)
            assert answer.split(b" ", 2)[1] in (b"400", b"404"), answer
            assert b"import" not in answer and b"Content-Security-Policy" in answer
            writer.close()

    asyncio.run(main())


def test_a_file_that_is_known_is_not_sent_again(page: Any, say: Any) -> None:
    async def main() -> None:
        async with page(say([50])) as made, made.http.get("app.js") as first:
            known = {"If-None-Match": first.headers["ETag"]}
            async with made.http.get("app.js", headers=known) as second:
                assert (first.status, second.status) == (200, 304)

    asyncio.run(main())


def test_a_foreign_name_for_this_machine_is_refused(page: Any, say: Any) -> None:
    async def main() -> None:
        async with page(say([50])) as made:
            for name, status in (("evil.example", 421), ("localhost:1", 200), ("[::1]", 200)):
                for path in ("", "state"):
                    async with made.http.get(path, headers={"Host": name}) as answer:
                        assert answer.status == status, name
            async with made.http.post(
                "api/v1/chat/completions", json=CHAT, headers={"Host": "evil.example"}
            ) as answer:
                assert answer.status == 421
        assert made.served.engine.submissions == []

    asyncio.run(main())


def test_state_and_events_tell_of_the_cluster(page: Any, say: Any) -> None:
    async def main() -> None:
        async with page(say([50])) as made, made.http.get("events") as stream:
            first = await event(stream)
            assert first["model"]["name"] == "tiny" and first["model"]["chat"] is True
            [replica] = first["cluster"]["replicas"]
            kv = replica["kv"]
            assert (kv["used"], kv["cached"], kv["free"], kv["total"]) == (8, 20, 12, 40)
            assert sum(kv["map"]["used"]) == 8 and sum(kv["map"]["shared"]) == 2
            assert replica["ranks"][0]["weight_bytes"] == 7
            times = {"schedule_s": 0, "execute_s": 0.1, "update_s": 0, "overhead_s": 0}
            made.figures.on_step(StepTimes(**times, rows=3, tokens=40, new_tokens=3))
            made.figures.on_first_token(0.25)
            made.figures.on_tokens(2, 0.1)
            second = await event(stream)
            sample = second["sample"]
            assert sample["first_token_p50_s"] == 0.25 and sample["inter_token_p95_s"] == 0.05
            assert sample["computed_tokens"] / sample["output_tokens"] == pytest.approx(40 / 3)
            assert sample["running"] == 3
            third = await event(stream)
            assert third["sample"]["first_token_p50_s"] is None
            assert third["sample"]["output_tokens"] == 0
            async with made.http.get("state") as answer:
                assert len((await answer.json())["samples"]) >= 2

    asyncio.run(main())


def test_watchers_are_counted(page: Any, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.controller.page.host.MAX_WATCHERS", 1)

    async def main() -> None:
        async with page(say([50])) as made:
            async with made.http.get("events") as stream:
                await event(stream)
                async with made.http.get("events") as other:
                    assert other.status == 429
            for _ in range(100):  # the first one's place is free once its end is seen
                async with made.http.get("events") as other:
                    if other.status == 200:
                        return
                await asyncio.sleep(0.1)
            raise AssertionError("the place never became free")

    asyncio.run(main())


def test_with_tokens_only_the_files_are_open(page: Any, say: Any, token_file: str) -> None:
    async def main() -> None:
        async with page(say([50]), token_file=token_file) as made:
            asked = [("GET", path) for path in ("state", "events", "api/v1/models", "api/health")]
            for method, path in [*asked, ("POST", "api/v1/chat/completions")]:
                for header in ({}, {"Authorization": "Bearer wrong"}):
                    async with made.http.request(method, path, json=CHAT, headers=header) as answer:
                        assert answer.status == 401, path
            async with made.http.get("") as answer:
                assert answer.status == 200
            known = {"Authorization": "Bearer b"}
            async with made.http.get("state", headers=known) as answer:
                assert answer.status == 200
            async with made.http.post(
                "api/v1/chat/completions", json=CHAT, headers=known
            ) as answer:
                assert answer.status == 200
                assert "Content-Security-Policy" in answer.headers
            assert [item.tenant for item in made.served.engine.submissions] == ["blue"]

    asyncio.run(main())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
def test_other_machines_need_tls_and_a_token(
    serve: Any, say: Any, host: str, token_file: str
) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            for options in ({}, {"token_file": token_file}):
                with pytest.raises(ConfigError, match="page is"):
                    PageHost(served.service, served.engine, None, host=host, **options)  # type: ignore[arg-type]

    asyncio.run(main())


@pytest.mark.parametrize("count", [0, 1, MAX_CELLS, MAX_CELLS + 1, 10 * MAX_CELLS - 3])
def test_cells_hold_every_block_once(count: int) -> None:
    blocks = bytes(index * 7 % 4 for index in range(count))
    made = cells(blocks)
    assert len(made["used"]) == len(made["shared"]) == len(made["cached"]) <= MAX_CELLS
    assert len(made["used"]) * made["blocks_per_cell"] >= made["blocks"] == count
    assert sum(made["used"]) == sum(block >= 2 for block in blocks)
    assert sum(made["cached"]) == blocks.count(1)
