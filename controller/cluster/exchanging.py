"""What every fleet says of KV blocks to ranks that are linked by sockets."""

from __future__ import annotations

from phalanx.protos.errors import TransferFailed
from phalanx.protos.moves import MoveReport
from phalanx.protos.transfers import Exchange, Offer, Take, Taken, Withdraw

from .link import RankLinks


class ExchangingFleet:
    """The part of `Fleet` that is about blocks."""

    _links: RankLinks | None = None

    @property
    def exchange(self) -> Exchange | None:
        """Where the ranks hand out blocks."""
        return None if self._links is None else self._links.exchange

    def tell(self, message: Offer | Withdraw | Take) -> None:
        """To every rank."""
        if self._links is None:
            raise TransferFailed("the fleet is not started")
        self._links.tell(message)

    def drain_taken(self) -> list[tuple[int, Taken]]:
        """What ranks have said of transfers."""
        return [] if self._links is None else self._links.drain_taken()

    def moves(self, timeout_s: float) -> list[tuple[int, MoveReport]]:
        """What ranks have said of moves between tiers, waiting so long for the first word."""
        return [] if self._links is None else self._links.moves(timeout_s)
