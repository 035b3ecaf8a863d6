"""Places requests: joins what is cached where with how busy the replicas are, and keeps why."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from phalanx.controller.kvcache.changes import prefix_key
from phalanx.controller.kvcache.prefix import PrefixNaming

from .index import GlobalPrefixIndex, Lower
from .lengths import OutputLengths
from .loads import Loads
from .router import Decision, Request

MAX_WALK_BLOCKS = 1024
"""Blocks of a prompt that are looked up at most. Hashing them takes half a millisecond."""
KEPT_PLACEMENTS = 1024

_log = logging.getLogger(__name__)


class Placement(NamedTuple):
    """A decision that was made for a tenant's request."""

    tenant: str
    request_id: str
    decision: Decision


class Placer:
    """Chooses replicas. Belongs to one event loop.

    A prompt is hashed block by block for as long as some replica holds the last block, so that a
    prompt that nobody knows costs little.
    """

    def __init__(self) -> None:
        self.index = GlobalPrefixIndex()
        self.loads = Loads()
        self.lengths = OutputLengths()
        self._placements: deque[Placement] = deque(maxlen=KEPT_PLACEMENTS)

    def choose(
        self,
        tenant: str,
        request_id: str,
        prompt_token_ids: Sequence[int],
        request: Request,
        naming: PrefixNaming,
        *,
        reads_cache: bool = True,
        copies: bool = True,
    ) -> Decision:
        """The decision for a request, which is kept.

        naming: of the replicas' prefixes, which is one for all. reads_cache: whether cached blocks
        spare the request anything. copies: whether they may be copied from replica to replica.
        """
        keys: map[int] | tuple[()] = ()
        if reads_cache:
            # never the last token: a replica has to compute that in any case
            blocks = min((len(prompt_token_ids) - 1) // naming.block_size, MAX_WALK_BLOCKS)
            digests = itertools.islice(naming.walk(tenant, prompt_token_ids), max(blocks, 0))
            keys = map(prefix_key, digests)
        return self.choose_by_keys(
            tenant, request_id, keys, request, naming.block_size, copies=copies
        )

    def choose_by_keys(
        self,
        tenant: str,
        request_id: str,
        keys: Iterable[int],
        request: Request,
        block_size: int,
        *,
        copies: bool = True,
    ) -> Decision:
        """The same for a prompt whose blocks are named already."""
        found, below = self.index.lookup(keys)
        runs = [(blocks * block_size, holders) for blocks, holders in found]
        lower = {
            replica: Lower(blocks.host * block_size, blocks.disk * block_size)
            for replica, blocks in below.items()
        }
        decision = self.loads.choose(request, runs, lower, copies=copies)
        self._placements.append(Placement(tenant, request_id, decision))
        _log.debug("request %r: %s", request_id, decision)
        return decision

    def placements(self) -> list[Placement]:
        """The last `KEPT_PLACEMENTS` of them, the oldest first."""
        return list(self._placements)
