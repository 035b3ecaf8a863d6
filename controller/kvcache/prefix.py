"""Prefix caching: the content of a full block, named by a chained hash, and who holds it."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .blocks import require
from .changes import ChangeLog, Tier

WALK_BLOCKS = 32
"""Blocks whose tokens are packed at once by a walk, which may end at any block."""


def _field(data: bytes) -> bytes:
    # the length in front keeps ("ab", "c") and ("a", "bc") apart
    return struct.pack("<Q", len(data)) + data


def _root(namespace: bytes, salt: bytes) -> bytes:
    return hashlib.sha256(_field(namespace) + _field(salt)).digest()


def _digests(last: bytes, size: int, token_ids: Sequence[int]) -> Iterator[bytes]:
    """The digests of full blocks that follow the one with the digest `last`."""
    width = 4 * size
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    for start in range(0, len(packed), width):
        last = hashlib.sha256(last + packed[start : start + width]).digest()
        yield last


class DigestChain:
    """Digests of a growing token sequence, one per full block.

    ::

        tokens   | block 0 | block 1 | block 2 | rest
        digests    d0 ------> d1 ------> d2      (none until the block is full)

        d[i]  = SHA-256(d[i - 1], token ids of block i)
        d[-1] = SHA-256(namespace, salt), each length-prefixed

    All that is hashed after d[-1] has a fixed length. Equal digests therefore mean: same model,
    same tenant, same tokens from position 0 on, so the same KV entries. A wilful collision is as
    hard as breaking SHA-256.
    """

    def __init__(self, block_size: int, namespace: bytes, salt: bytes) -> None:
        self._block_size = block_size
        self._root = _root(namespace, salt)
        self._rest: list[int] = []
        self.digests: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        """Tokens fed so far."""
        return len(self.digests) * self._block_size + len(self._rest)

    def feed(self, token_ids: Sequence[int]) -> None:
        """Append tokens. Amortised O(len(token_ids))."""
        self._rest += token_ids
        full = len(self._rest) // self._block_size * self._block_size
        last = self.digests[-1] if self.digests else self._root
        self.digests += _digests(last, self._block_size, self._rest[:full])
        del self._rest[:full]

    def branch(self, token_ids: Sequence[int]) -> DigestChain:
        """The chain of `token_ids`, which must be a prefix of the tokens fed so far."""
        chain = DigestChain.__new__(DigestChain)
        chain._block_size, chain._root, chain._rest = self._block_size, self._root, []
        chain.digests = self.digests[: len(token_ids) // self._block_size]
        chain.feed(token_ids[len(chain.digests) * self._block_size :])
        return chain


@dataclass(frozen=True, slots=True)
class PrefixNaming:
    """How prefixes are named: equal on two replicas exactly when their digests can be compared.

    namespace: names what the KV entries depend on besides the tokens (the model); hashed in.
    """

    block_size: int
    namespace: bytes

    def chain(self, tenant: str, token_ids: Sequence[int] = ()) -> DigestChain:
        """The digests of a tenant's tokens."""
        salt = tenant.encode("utf-8", "surrogatepass")
        chain = DigestChain(self.block_size, self.namespace, salt)
        chain.feed(token_ids)
        return chain

    def walk(self, tenant: str, token_ids: Sequence[int]) -> Iterator[bytes]:
        """The same digests one by one, each computed when it is asked for."""
        salt, size = tenant.encode("utf-8", "surrogatepass"), self.block_size
        last, piece = _root(self.namespace, salt), WALK_BLOCKS * size
        for start in range(0, len(token_ids) // size * size, piece):
            tokens = token_ids[start : start + piece]
            for digest in _digests(last, size, tokens[: len(tokens) // size * size]):
                last = digest
                yield digest


class PrefixIndex:
    """Digest -> block, and the unreferenced cached blocks from least to most recently used.

    Every call is O(1). When two blocks have the same content, the first stays the indexed one:
    block tables only ever grow at the end, so no sequence is moved over to the other's block.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._log: ChangeLog | None = None

    def track_changes(self, epoch: int) -> ChangeLog:
        """Begin to record what comes and goes."""
        self._log = ChangeLog(epoch)
        return self._log

    def digests(self) -> Iterator[bytes]:
        """All that is indexed."""
        yield from self._block_of

    @property
    def num_idle(self) -> int:
        """Cached blocks that no sequence refers to."""
        return len(self._idle)

    @property
    def idle(self) -> Iterable[int]:
        """These blocks, the least recently used first."""
        return self._idle

    def find(self, digest: bytes) -> int | None:
        """The block with this content, if there is one."""
        return self._block_of.get(digest)

    def insert(self, digest: bytes, block: int) -> None:
        """Index a referenced block, unless its content is indexed already."""
        if digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest
            if self._log is not None:
                self._log.record(digest, Tier.DEVICE)

    def holds(self, block: int) -> bool:
        """Whether the block is indexed."""
        return block in self._digest_of

    def retire(self, block: int) -> None:
        """An indexed block lost its last reference: it becomes the most recently used idle one."""
        self._idle[block] = None

    def revive(self, block: int) -> None:
        """An indexed block is referred to again, or already was."""
        self._idle.pop(block, None)

    def digest(self, block: int) -> bytes:
        """The name of an indexed block's content."""
        return self._digest_of[block]

    def evict(self) -> tuple[int, bytes]:
        """Forget the least recently used idle block; itself and what it held. Needs `num_idle` >
        0."""
        block, _ = self._idle.popitem(last=False)
        digest = self._digest_of.pop(block)
        del self._block_of[digest]
        if self._log is not None:
            self._log.record(digest, Tier.NONE)
        return block, digest

    def forget(self, digest: bytes) -> int | None:
        """Forget this content; the block that held it if it was idle, which is the caller's now."""
        block = self._block_of.pop(digest, None)
        if block is None:
            return None
        del self._digest_of[block]
        if self._log is not None:
            self._log.record(digest, Tier.NONE)
        if block not in self._idle:
            return None
        del self._idle[block]
        return block

    def idle_blocks(self) -> frozenset[int]:
        """All idle blocks, for audits; checks the two maps against each other."""
        for digest, block in self._block_of.items():
            require(self._digest_of.get(block) == digest, f"block {block} has two digests")
        require(len(self._block_of) == len(self._digest_of), "an indexed block has no digest")
        require(self._idle.keys() <= self._digest_of.keys(), "an idle block is not indexed")
        return frozenset(self._idle)
