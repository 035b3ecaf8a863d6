"""What the gRPC front asks of the engine behind it, and whom it tells what happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

from phalanx.controller.cluster.snapshot import ClusterSnapshot
from phalanx.controller.movement.movement import KeptMove
from phalanx.controller.routing.placer import Placement
from phalanx.controller.scheduling.request import TokenEvent
from phalanx.protos.sampling import SamplingParams

Take = Callable[[TokenEvent], None]


class Engine(Protocol):
    """Tokens in, tokens out. Every method belongs to one event loop."""

    def submit(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        tenant: str,
        deadline: float | None,
        known: Mapping[int, Sequence[int]] | None = None,
        priority: int = 0,
    ) -> AsyncIterator[list[TokenEvent]]:
        """The events of all samples, in batches as steps bring them, until each has finished.

        deadline: in seconds of `time.monotonic()`. priority: among the tenant's waiting requests,
        the lower one comes first. The first iteration admits the request and
        raises `AlreadyExists`, `ResourceExhausted`, `Unavailable`, `InvalidArgument` or
        `DeadlineExceeded` when it is refused. Closing the iterator frees all that the request
        holds, at once.

        known: the samples still to be finished with their tokens so far, of a request that was
        accepted before; it is not refused for want of room, and only what is new comes.
        """

    def divert(self, request_id: str, tenant: str, take: Take) -> None:
        """Hand what comes of a running request to `take` at once, with no task woken for it.

        Events that end a sample, and any that come while one of them waits, still go to the iterator,
        which raises what `take` raises. An engine may do so for none.
        """

    def check_room(self, tenant: str) -> None:
        """Raises `ResourceExhausted` or `Unavailable` where a new request of the tenant would be
        refused now, whatever it asks: for little, before the request is looked at."""

    def stop_sample(self, request_id: str, sample_index: int, tenant: str) -> None:
        """This sample needs no more tokens (a stop string matched); it ends with ABORT."""

    def abort(self, request_id: str, tenant: str) -> bool:
        """End the tenant's request; its samples end with ABORT. False: it has no such request."""

    def snapshot(self) -> ClusterSnapshot:
        """The cluster as of the last step."""

    def placements(self) -> Sequence[Placement]:
        """Where the latest requests went and why, the oldest first."""

    def moves(self) -> Sequence[KeptMove]:
        """The latest hand-overs of requests between replicas, the oldest first."""


class Observer(Protocol):
    """Told about every request. Called on the event loop; must be quick."""

    def on_start(self, method: str) -> None:
        """A request of this RPC ("Generate", "Chat") came in."""

    def on_first_token(self, seconds: float) -> None:
        """The first token left, `seconds` after the request came in."""

    def on_tokens(self, count: int, gap_seconds: float) -> None:
        """A further message left with `count` tokens, `gap_seconds` after the one before it."""

    def on_end(
        self, outcome: str, prompt_tokens: int, completion_tokens: int, seconds: float
    ) -> None:
        """A request ended with a finish reason or the name of a gRPC status, in lower case."""
