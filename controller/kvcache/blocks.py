"""The blocks of the paged KV pool: free ones, and how many sequences refer to the others."""

from __future__ import annotations

from collections.abc import Iterable


class IntegrityError(RuntimeError):
    """The books do not agree: a defect of the scheduler or the block manager."""


def require(condition: bool, message: str) -> None:
    """Raise `IntegrityError(message)` unless `condition` holds."""
    if not condition:
        raise IntegrityError(message)


class BlockPool:
    """Reference counts and the free list of blocks 0 .. num_blocks - 1. Every call is O(1).

    A block is free (on the list), referenced (count > 0), or neither: unreferenced, but kept out
    of the list by its owner because its content may be wanted again.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Blocks on the free list."""
        return len(self._free)

    def take(self) -> int:
        """A block from the free list, now referenced once. Precondition: `num_free` > 0."""
        block = self._free.pop()
        self._references[block] = 1
        return block

    def refer(self, block: int) -> None:
        """One more reference to a block that is not on the free list."""
        self._references[block] += 1

    def drop(self, block: int) -> bool:
        """One reference less. True when none is left: the caller keeps the block or frees it."""
        self._references[block] -= 1
        return self._references[block] == 0

    def free(self, block: int) -> None:
        """Put an unreferenced block on the free list."""
        self._free.append(block)

    def references(self, block: int) -> int:
        """How many sequences refer to the block."""
        return self._references[block]

    def counts(self) -> Iterable[int]:
        """How many sequences refer to each block, in order. O(num_blocks)."""
        return self._references

    def free_blocks(self) -> frozenset[int]:
        """The free list, for audits. O(num_blocks)."""
        require(len(set(self._free)) == len(self._free), "a block is twice on the free list")
        return frozenset(self._free)
