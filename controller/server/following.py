"""From events to an answer, and from there to the caller."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from phalanx.controller.scheduling.request import TokenEvent
from phalanx.protos.errors import RequestFailed, ResourceExhausted

from .answer import SLOW_RETRY_S, Answer, Response
from .books import Call
from .sessions import Session
from .stalls import StallWatch

BATCH_EVENTS = 256
"""Of a log are read at a time."""


async def read_events(events: AsyncIterator[list[TokenEvent]], answer: Answer) -> None:
    """Fold in events as they come until the answer is over; then, or when cancelled, close."""
    try:
        async for batch in events:
            answer.fold(batch)
            if answer.over:
                return
        answer.fail(RequestFailed("the engine ended the request early"))
    except Exception as error:  # noqa: BLE001  handed to the call, which raises it
        answer.fail(error)
    finally:
        if close := getattr(events, "aclose", None):
            await close()


class LogReader:
    """Reads a session's log from its beginning."""

    def __init__(self, session: Session) -> None:
        self._session, self._at = session, 0

    @property
    def at_end(self) -> bool:
        """Whether nothing more has come yet."""
        return self._at == len(self._session.log)

    def next(self) -> Sequence[TokenEvent]:
        """What comes next, a bounded number of events; none when nothing is there yet.

        Raises what the session ended of, or `RequestFailed` when the log is complete.
        """
        session = self._session
        batch = session.log[self._at : self._at + BATCH_EVENTS]
        self._at += len(batch)
        if not batch:
            if session.error is not None:
                raise session.error
            if session.complete:
                raise RequestFailed("the engine ended the request early")
        return batch


def read_log(log: LogReader, answer: Answer) -> bool:
    """Fold in what comes next of a log; whether there may be more at once.

    Events wait in the log for a slow reader, so there is no end to its slowness here.
    """
    if answer.over:
        return False
    try:
        answer.fold(log.next())
    except Exception as error:  # noqa: BLE001  handed to the call, which raises it
        answer.fail(error)
    return not log.at_end


async def write_answer(
    answer: Answer,
    call: Call,
    kind: type[Response],
    request_id: str,
    max_stall_s: float,
    read: Callable[[], bool] = lambda: False,
    interval_s: float = 0.0,
) -> None:
    """Send what there is until the answer is over. What comes in meanwhile is sent together.

    read: folds more into the answer; whether it is to be called again without a wait. interval_s:
    between two messages at least, unless the answer is over. Raises
    `ResourceExhausted` when a message was not taken for `max_stall_s`.
    """
    watch, write = StallWatch(max_stall_s), call.reader.write
    try:
        with watch:
            while True:
                more = read()
                answer.news.hush()  # of what is taken below
                over = answer.over
                while (message := answer.take(kind, request_id)) is not None:
                    watch.begin()
                    await write(message)
                    watch.done()
                    call.sent(answer.taken_tokens)
                    if interval_s and not answer.plenty:
                        answer.news.mute(interval_s)
                        break
                if over and answer.empty:
                    return
                if not (more or answer.over):
                    await answer.news.wait()
    except TimeoutError:
        text = f"a message was not read for {max_stall_s:g} s"
        raise ResourceExhausted(text, SLOW_RETRY_S) from None
    finally:
        answer.news.unmute()
