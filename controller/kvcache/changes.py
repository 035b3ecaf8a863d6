"""What enters and leaves one replica's prefix index, as numbered changes for whoever routes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

KEY_BYTES = 8


class Tier(IntEnum):
    """Where a replica holds a block; the lowest number but NONE is the fastest."""

    NONE = 0
    DEVICE = 1
    HOST = 2
    DISK = 3


def prefix_key(digest: bytes) -> int:
    """A prefix's name for routing: the first 8 bytes of its digest, as an unsigned integer.

    Two of 10^8 prefixes share a name with a probability of 3 in 10,000. That costs time and
    nothing else: a request goes to a replica that lacks its prefix, and the replica itself matches
    whole digests. A tenant who seeks collisions finds them among his own prompts only, because the
    tenant is hashed in.
    """
    return int.from_bytes(digest[:KEY_BYTES], "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixUpdate:
    """Changes of one prefix index, in order. Those of an epoch are numbered from 0, without a gap.

    A listing holds no changes, but everything that is indexed before change number `first`.
    """

    epoch: int
    """The replica's group of ranks; a later group has a greater one, and starts empty."""
    first: int
    """Number of the first change."""
    keys: array[int] = field(default_factory=lambda: array("Q"))
    """8-byte names, see `prefix_key`."""
    added: bytes = b""
    """For each key the fastest `Tier` that holds it now. In a listing, empty if that is the device
    for all."""
    listing: bool = False

    @property
    def next(self) -> int:
        """Number of the first change after these."""
        return self.first if self.listing else self.first + len(self.keys)


class ChangeLog:
    """Gathers the changes of a prefix index until they are fetched. Not thread-safe."""

    def __init__(self, epoch: int) -> None:
        self._epoch, self._next = epoch, 0
        self._keys, self._added = array("Q"), bytearray()
        self._listing_due = True

    def record(self, digest: bytes, tier: Tier) -> None:
        """The fastest tier that holds a digest is another one now."""
        self._keys.append(prefix_key(digest))
        self._added.append(tier)

    def ask_listing(self) -> None:
        """Let the next update be a listing, for a reader who has missed something."""
        self._listing_due = True

    def drain(self, held: Callable[[], Iterable[tuple[bytes, Tier]]]) -> PrefixUpdate | None:
        """What happened since the last call, None if nothing. The first update is a listing.

        held: gives all digests that are held now, with their tiers; called for a listing only.
        """
        if not self._keys and not self._listing_due:
            return None
        keys, added = self._keys, bytes(self._added)
        first, self._next = self._next, self._next + len(keys)
        self._keys, self._added = array("Q"), bytearray()
        if self._listing_due:
            self._listing_due = False
            everything, tiers = array("Q"), bytearray()
            for digest, tier in held():
                everything.append(prefix_key(digest))
                tiers.append(tier)
            added = b"" if set(tiers) <= {Tier.DEVICE} else bytes(tiers)
            return PrefixUpdate(
                epoch=self._epoch, first=self._next, keys=everything, added=added, listing=True
            )
        return PrefixUpdate(epoch=self._epoch, first=first, keys=keys, added=added)
