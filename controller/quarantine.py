"""Requests that groups of ranks died of, remembered by what was asked, so that they kill no more."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from phalanx.protos.errors import SetAside
from phalanx.protos.sampling import SamplingParams

from .scheduling.request import FinishReason
from .stream import Stream

KEEP_S = 600.0
MOST = 1024


class Quarantine:
    """Belongs to one event loop. Times are of one monotonic clock, seconds."""

    def __init__(self, keep_s: float = KEEP_S, most: int = MOST) -> None:
        """keep_s: for so long a request is refused. most: of how many; the oldest are let go."""
        self._keep_s, self._most = keep_s, most
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def convict(self, stream: Stream, now: float) -> None:
        """End a request that groups died of, and refuse such ones from now on. A request without a
        name is a canary: its group died, not of it."""
        times = "once" if stream.losses == 1 else f"{stream.losses} times"
        text = f"the ranks died {times} while they computed this request, the last time alone"
        if stream.request_id:
            self.set_aside(*stream.asked, now)
        stream.end(FinishReason.ERROR, error=SetAside(text))

    def set_aside(self, prompt: Sequence[int], params: SamplingParams, now: float) -> None:
        """Refuse such requests from now on."""
        if self._keep_s <= 0:
            return
        self._until[_fingerprint(prompt, params)] = now + self._keep_s
        while len(self._until) > self._most:
            self._until.popitem(last=False)

    def check(self, prompt: Sequence[int], params: SamplingParams, now: float) -> None:
        """Raises `SetAside` for a request that is in quarantine."""
        if not self._until:
            return
        name = _fingerprint(prompt, params)
        until = self._until.get(name)
        if until is not None and until <= now:
            del self._until[name]
        elif until is not None:
            raise SetAside(f"ranks died of this request; it is refused for {until - now:.0f} s")


def _fingerprint(prompt: Sequence[int], params: SamplingParams) -> bytes:
    """Of what is asked, whatever the seed, which the server may have drawn."""
    fields = [list(prompt), msgspec.structs.replace(params, seed=0)]
    return hashlib.sha256(msgspec.msgpack.encode(fields)).digest()
