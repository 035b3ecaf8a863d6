"""Priority and deadline reach the engine from every front, and wrong ones are named."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from phalanx.protos.errors import DeadlineExceeded, InvalidArgument


def test_the_client_says_how_urgent_a_request_is(serve: Any, say: Any) -> None:
    async def main() -> None:
        async with serve(say([50])) as served:
            for named in ("", "mine"):
                now = time.monotonic()
                await served.client.complete("the", request_id=named, priority=-7, deadline_s=2.5)
                submission = served.engine.submissions[-1]
                assert submission.priority == -7
                assert 2.0 < submission.deadline - now < 3.5, "and not the call's 30 seconds"
            await served.client.ask("the")
            assert served.engine.submissions[-1].priority == 0
            for given, field in (
                ({"priority": 101}, "options.priority"),
                ({"deadline_s": 0}, "options.deadline_s"),
                ({"deadline_s": float("nan")}, "options.deadline_s"),
            ):
                with pytest.raises(InvalidArgument, match=field):
                    await served.client.complete("the", **given)
            for given in ({"priority": "high"}, {"priority": 2**40}):
                with pytest.raises(InvalidArgument, match="options.priority"):
                    await served.client.complete("the", **given)

    asyncio.run(main())


def test_a_deadline_of_the_request_ends_it_with_its_status(serve: Any) -> None:
    from phalanx.controller.scheduling.request import FinishReason

    async def late(submission: Any) -> Any:
        await asyncio.sleep(max(submission.deadline - time.monotonic(), 0))
        yield [submission.event(finish=FinishReason.DEADLINE)]

    async def main() -> None:
        async with serve(late) as served:
            with pytest.raises(DeadlineExceeded):
                await served.client.complete("the", deadline_s=0.05)

    asyncio.run(main())
