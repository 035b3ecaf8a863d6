"""A bell loses no news and wakes for none twice."""

from __future__ import annotations

import asyncio
import contextlib

from phalanx.controller.bell import Bell


async def returns(bell: Bell) -> bool:
    """Whether a wait ends by what has been rung so far."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(bell.wait(), 0.02)
        return True
    return False


def test_a_ring_before_the_wait_counts_once() -> None:
    async def main() -> None:
        bell = Bell()
        bell.ring()
        bell.ring()
        assert await returns(bell)
        assert not await returns(bell)

    asyncio.run(main())


def test_a_ring_ends_the_wait() -> None:
    async def main() -> None:
        bell = Bell()
        waiting = asyncio.create_task(bell.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        bell.ring()
        bell.ring()
        await waiting
        assert not await returns(bell)

    asyncio.run(main())


def test_what_is_hushed_is_not_heard() -> None:
    async def main() -> None:
        bell = Bell()
        bell.ring()
        bell.hush()
        assert not await returns(bell)

    asyncio.run(main())


def test_a_cancelled_wait_leaves_the_news_to_the_next() -> None:
    async def main() -> None:
        bell = Bell()
        waiting = asyncio.create_task(bell.wait())
        await asyncio.sleep(0)
        bell.ring()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await returns(bell)

    asyncio.run(main())
