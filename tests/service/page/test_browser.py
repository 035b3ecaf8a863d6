"""The page in a real browser: it streams, shows the cluster, and runs nothing that a model says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.slow

NASTY = '<img src=x onerror="window.hacked=1"> **bold** `<b>code</b>`\n\n```\n<script>window.hacked=1</script>\n```'
LAST_ANSWER = "document.querySelector('.turn.answer:last-of-type')"


def test_a_conversation(page: Any, browser: Any, say: Any, words: list[int]) -> None:
    async def main() -> None:
        script = say(words, pause=lambda: asyncio.sleep(0.02))
        async with page(script) as made, browser() as tab:
            await tab.resize(1280, 800)
            await tab.open(made.host.url)
            await tab.until("document.getElementById('model').textContent === 'tiny'")
            # by keyboard alone: the first Tab skips to the question
            await tab.key("Tab")
            assert await tab.run("document.activeElement.className") == "skip"
            await tab.run("document.getElementById('question').focus()")
            await tab.call("Input.insertText", text="hello")
            await tab.key("Enter", "\r")
            seen = set()
            while await tab.run("document.querySelector('[aria-busy=true]') !== null"):
                seen.add(await tab.run(f"{LAST_ANSWER}?.querySelector('.said').textContent"))
            assert len(seen) > 2, "the text came at once"
            text = await tab.run(f"{LAST_ANSWER}.querySelector('.said').textContent")
            assert text.startswith("the quick brown fox")
            assert "tokens" in await tab.run(f"{LAST_ANSWER}.querySelector('.facts').textContent")
            assert await tab.run("document.activeElement.id") == "question"
            assert tab.complaints == []
        [submission] = made.served.engine.submissions
        assert submission.params.max_tokens == 32

    asyncio.run(main())


def test_escape_stops_the_answer(page: Any, browser: Any, endless_script: Any) -> None:
    async def main() -> None:
        async with page(endless_script) as made, browser() as tab:
            await tab.open(made.host.url)
            await tab.until("document.getElementById('model').textContent === 'tiny'")
            await tab.run("document.querySelector('.example').textContent = 'go'")
            await tab.run("document.querySelector('.example').click()")
            await tab.until(f"{LAST_ANSWER}?.textContent.length > 3")
            assert await tab.run("document.getElementById('send').hidden")
            await tab.key("Escape")
            await tab.until(f"{LAST_ANSWER}.textContent.includes('stopped')")
            await asyncio.wait_for(made.served.engine.submissions[0].closed.wait(), 30)

    asyncio.run(main())


def test_the_cluster_is_shown(page: Any, browser: Any, say: Any) -> None:
    async def main() -> None:
        async with page(say([50])) as made, browser() as tab:
            await tab.resize(1280, 800)
            await tab.open(made.host.url)
            await tab.until(
                "document.querySelector('.replica .kv')?.textContent.includes('cached')"
            )
            kv = await tab.run("document.querySelector('.kv figcaption').textContent")
            assert "8 in use, 20 cached, 12 free" in kv
            rank = "[...document.querySelectorAll('.ranks tbody td')].map(c => c.textContent)"
            assert (await tab.run(rank))[:4] == ["0", "1", "4–5", "here"]
            drawn = (
                "document.querySelector('canvas').getContext('2d').getImageData(4, 4, 1, 1).data[3]"
            )
            assert await tab.until(drawn) == 255
            made.figures.on_first_token(0.25)
            await tab.until("document.getElementById('charts').textContent.includes('250 ms')")
            assert await tab.run("document.querySelectorAll('.chart svg path').length") >= 4
            before = await tab.run("getComputedStyle(document.body).backgroundColor")
            await tab.run("document.getElementById('theme').click()")
            assert before != await tab.run("getComputedStyle(document.body).backgroundColor")
            assert tab.complaints == []

    asyncio.run(main())


def test_on_a_phone_nothing_is_cut_off(page: Any, browser: Any, say: Any) -> None:
    async def main() -> None:
        async with page(say([50])) as made, browser() as tab:
            await tab.resize(360, 700)
            await tab.open(made.host.url)
            await tab.until(
                "document.querySelector('.replica .kv')?.textContent.includes('cached')"
            )
            wide = "document.documentElement.scrollWidth > innerWidth"
            shown = "document.getElementById('{}').checkVisibility()"
            assert await tab.run(shown.format("chat")) and not await tab.run(
                shown.format("cluster")
            )
            assert not await tab.run(wide)
            await tab.run("document.getElementById('tab-chat').focus()")
            await tab.key("ArrowRight")
            assert await tab.run(shown.format("cluster")) and not await tab.run(
                shown.format("chat")
            )
            assert not await tab.run(wide)

    asyncio.run(main())


def test_what_a_model_says_is_text(page: Any, browser: Any, say: Any) -> None:
    async def main() -> None:
        async with page(say([50])) as made, browser() as tab:
            await tab.open(made.host.url)
            place = "document.getElementById('log')"
            await tab.run(f"import('{made.host.url}text.js').then(m => m.show({place}, {NASTY!r}))")
            assert await tab.run(f"{place}.querySelector('img, script, b')") is None
            assert await tab.run(f"{place}.querySelector('pre').textContent") == (
                "<script>window.hacked=1</script>"
            )
            assert await tab.run(f"{place}.querySelector('strong').textContent") == "bold"
            assert await tab.run("window.hacked") is None

    asyncio.run(main())


def test_a_token_is_asked_for(page: Any, browser: Any, say: Any, token_file: str) -> None:
    async def main() -> None:
        async with page(say([50]), token_file=token_file) as made, browser() as tab:
            await tab.open(made.host.url)
            for token, wrong in (("no", True), ("b", False)):
                await tab.until("document.getElementById('token-dialog').open")
                await tab.run(f"document.getElementById('token-value').value = {token!r}")
                await tab.run("document.querySelector('#token-dialog .primary').click()")
                if wrong:
                    await tab.until("!document.getElementById('token-wrong').hidden")
            await tab.until("document.getElementById('model').textContent === 'tiny'")
            assert not await tab.run("document.getElementById('token-dialog').open")

    asyncio.run(main())
