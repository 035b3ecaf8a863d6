"""Places requests: joins what is cached where with how busy the replicas are, and keeps why."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from phalanx.controller.kvcache.changes import prefix_key
from phalanx.controller.kvcache.prefix import PrefixNaming

from .index import GlobalPrefixIndex
from .router import Candidate, Decision, route

MAX_WALK_BLOCKS = 1024
"""Blocks of a prompt that are looked up at most. Hashing them takes a few milliseconds."""
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
    prompt that nobody knows costs one block's hash.
    """

    def __init__(self) -> None:
        self.index = GlobalPrefixIndex()
        self._placements: deque[Placement] = deque(maxlen=KEPT_PLACEMENTS)

    def choose(
        self,
        tenant: str,
        request_id: str,
        prompt_token_ids: Sequence[int],
        *,
        known_tokens: int,
        samples: int,
        reads_cache: bool,
        naming: PrefixNaming,
        candidates: Sequence[Candidate],
    ) -> Decision:
        """The decision for a request, which is kept.

        known_tokens: those to be computed before the first one comes, if nothing is cached.
        candidates: at least one, and all of this naming; what they have cached is filled in here.
        """
        if reads_cache:
            cached = self._cached(tenant, prompt_token_ids, naming, candidates)
            candidates = [
                dataclasses.replace(candidate, cached_tokens=cached[candidate.index])
                for candidate in candidates
            ]
        decision = route(known_tokens, samples, candidates)
        self._placements.append(Placement(tenant, request_id, decision))
        _log.debug("request %r: %s", request_id, decision)
        return decision

    def placements(self) -> list[Placement]:
        """The last `KEPT_PLACEMENTS` of them, the oldest first."""
        return list(self._placements)

    def _cached(
        self,
        tenant: str,
        prompt_token_ids: Sequence[int],
        naming: PrefixNaming,
        candidates: Sequence[Candidate],
    ) -> dict[int, int]:
        """Tokens of the prompt that each candidate holds; never the last one, as a replica has to
        compute that in any case."""
        blocks = min((len(prompt_token_ids) - 1) // naming.block_size, MAX_WALK_BLOCKS)
        digests = itertools.islice(naming.walk(tenant, prompt_token_ids), max(blocks, 0))
        replicas = [candidate.index for candidate in candidates]
        runs = self.index.cached_blocks(map(prefix_key, digests), replicas)
        return {replica: run * naming.block_size for replica, run in runs.items()}
