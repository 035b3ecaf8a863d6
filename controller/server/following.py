"""An answer and the events that it is made of."""

from __future__ import annotations

from collections.abc import AsyncIterator

from phalanx.controller.scheduling.request import TokenEvent
from phalanx.protos.errors import RequestFailed

from .answer import Answer


async def read_events(
    events: AsyncIterator[list[TokenEvent]], answer: Answer, *, at_ease: bool = False
) -> None:
    """Fold in events until the answer is over; then, or when cancelled, close.

    at_ease: events wait where they are for a slow reader; else there is an end to its slowness.
    """
    try:
        async for batch in events:
            if at_ease:
                await answer.room()
            answer.fold(batch)
            if answer.over:
                return
        answer.fail(RequestFailed("the engine ended the request early"))
    except Exception as error:  # noqa: BLE001  handed to the call, which raises it
        answer.fail(error)
    finally:
        if close := getattr(events, "aclose", None):
            await close()
