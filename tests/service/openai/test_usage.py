"""Tokens counted while an answer comes."""

from __future__ import annotations

import asyncio
from typing import Any


def test_usage_in_every_chunk(front: Any, say: Any, words: list[int]) -> None:
    async def main() -> None:
        async with front(say(words[:6], step=2)) as made:
            options: Any = {"include_usage": True, "continuous_usage_stats": True}
            stream = await made.client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "say it"}],
                stream=True,
                stream_options=options,
            )
            counts = [chunk.usage async for chunk in stream]
            assert None not in counts
            said = [item.completion_tokens for item in counts]
            assert said == sorted(said)
            assert said[-1] == 6
            prompt = len(made.submissions[0].prompt_token_ids)
            assert {item.prompt_tokens for item in counts} == {prompt}
            assert {item.total_tokens - item.completion_tokens for item in counts} == {prompt}

    asyncio.run(main())
