"""What is logged of requests, and what never is."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from phalanx.controller.logs import logged_to
from phalanx.controller.openai.host import OpenAIHost
from phalanx.protos.errors import PhalanxError

SECRET = "xyzzy"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """All that is logged, as JSON, from debug on."""
    logger = logging.getLogger("phalanx")
    before = logger.level
    logger.setLevel("DEBUG")
    stream = io.StringIO()
    with logged_to(stream, "json"):
        yield stream
    logger.setLevel(before)


def test_a_line_for_each_request(serve: Any, say: Any, lines: io.StringIO) -> None:
    async def main() -> None:
        async with serve(say([50, 51, 52])) as served:
            async for _ in served.client.generate(SECRET, request_id="mine"):
                pass
            with pytest.raises(PhalanxError):
                async for _ in served.client.generate(SECRET, temperature=-1.0):
                    pass

    asyncio.run(main())
    good, bad = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert good["message"] == "a request has ended" and good["level"] == "info"
    assert good["request_id"] == "mine" and good["method"] == "Generate"
    assert (good["outcome"], good["completion_tokens"]) == ("length", 3)
    assert good["seconds"] >= good["first_token_s"] > 0
    assert good["time"].endswith("Z") and good["tenant"] == "default"
    assert bad["outcome"] == "invalid_argument" and bad["first_token_s"] is None


def test_no_line_holds_what_users_wrote(serve: Any, say: Any, lines: io.StringIO) -> None:
    """Whatever ends the request: its end, a refusal, a defect of ours whose error quotes it."""

    async def script(submission: Any) -> Any:
        if submission.params.max_tokens == 5:
            raise RuntimeError(f"cannot go on with {SECRET}")
        async for batch in say([50, 51])(submission):
            yield batch

    async def main() -> None:
        async with serve(script) as served:
            host = OpenAIHost(served.service)
            await host.start()
            async with httpx.AsyncClient(base_url=host.url, timeout=30) as http:
                chat = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}]}
                bodies: list[Any] = [
                    ("/chat/completions", chat | {"max_tokens": 2}),
                    ("/chat/completions", chat | {"max_tokens": 5}),
                    ("/chat/completions", chat | {SECRET: 1}),
                    ("/completions", {"model": "tiny", "prompt": SECRET, "stop": [SECRET]}),
                    ("/completions", {"model": SECRET, "prompt": SECRET}),
                    (f"/{SECRET}", chat),
                ]
                statuses = [(await http.post(path, json=body)).status_code for path, body in bodies]
                assert statuses == [200, 500, 400, 200, 404, 404]
                raw = {"Content-Type": "application/json"}
                await http.post("/completions", content=b'{"prompt": "xyzzy', headers=raw)
            grammar = {"json_schema": f'{{"type": "{SECRET}"}}'}
            params: dict[str, Any]
            for params in ({"max_tokens": 5}, {"stop": [SECRET] * 99}, {"grammar": grammar}):
                try:
                    async for _ in served.client.generate(SECRET, **params):
                        pass
                except PhalanxError:
                    continue
            await host.stop(0)
            logging.getLogger("somebody.else").warning("of no request")

    asyncio.run(main())
    text = lines.getvalue()
    assert SECRET not in text
    found = [json.loads(line) for line in text.splitlines()]
    incidents = [line for line in found if "incident" in line["message"]]
    assert len(incidents) >= 2 and all(line["request_id"] for line in incidents)
    assert {"length", "error", "invalid_argument"} <= {line.get("outcome") for line in found}
    assert "request_id" not in found[-1] or found[-1]["request_id"] == ""


@pytest.mark.parametrize("kind", ["text", "json"])
def test_an_exceptions_text_is_left_out(kind: str) -> None:
    stream = io.StringIO()
    with logged_to(stream, kind):
        try:
            raise ValueError(SECRET)
        except ValueError:
            logging.getLogger("phalanx.test").exception("it failed")
    text = stream.getvalue()
    assert SECRET not in text.replace("raise ValueError(SECRET)", "") and "ValueError" in text
    assert "it failed" in text and "test_logs.py" in text
    if kind == "json":
        assert json.loads(text)["level"] == "error"


def test_a_text_line_is_one_line(serve: Any) -> None:
    stream = io.StringIO()
    with logged_to(stream, "text"):
        extra = {"fields": {"tenant": "a\nb"}}
        logging.getLogger("phalanx.test").warning("something", extra=extra)
    assert stream.getvalue().count("\n") == 1 and r"tenant='a\nb'" in stream.getvalue()
