"""Digest chains: equal if and only if everything that they name is equal."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.kvcache.prefix import DigestChain

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
SIZES = st.integers(1, 4)


def digests(
    size: int, tokens: list[int], namespace: bytes = b"model", salt: bytes = b"tenant"
) -> list[bytes]:
    chain = DigestChain(size, namespace, salt)
    chain.feed(tokens)
    return chain.digests


@given(SIZES, TOKENS, st.lists(st.integers(0, 20)))
def test_feeding_in_pieces_changes_nothing(size: int, tokens: list[int], cuts: list[int]) -> None:
    chain = DigestChain(size, b"model", b"tenant")
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, stop in pairwise(edges):
        chain.feed(tokens[start:stop])
    assert chain.digests == digests(size, tokens)
    assert len(chain.digests) == len(tokens) // size


@given(SIZES, st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_digests_agree_exactly_where_the_prefixes_do(
    size: int, left: list[int], right: list[int]
) -> None:
    pairs = zip(digests(size, left), digests(size, right), strict=False)
    for index, (first, second) in enumerate(pairs):
        stop = (index + 1) * size
        assert (first == second) == (left[:stop] == right[:stop])


@given(SIZES, TOKENS, st.integers(0, 20), TOKENS)
def test_a_branch_is_the_chain_of_its_tokens(
    size: int, tokens: list[int], cut: int, more: list[int]
) -> None:
    trunk = DigestChain(size, b"model", b"tenant")
    trunk.feed(tokens)
    branch = trunk.branch(tokens[:cut])
    branch.feed(more)
    assert branch.digests == digests(size, tokens[:cut] + more)
    trunk.feed(more)
    assert trunk.digests == digests(size, tokens + more), "the trunk is not disturbed"


def test_namespace_and_salt_are_kept_apart() -> None:
    names = [(b"ab", b"c"), (b"a", b"bc"), (b"abc", b""), (b"", b"abc"), (b"c", b"ab")]
    found = {digests(1, [7], namespace, salt)[0] for namespace, salt in names}
    assert len(found) == len(names)


def test_no_two_blocks_of_a_repetitive_text_are_equal() -> None:
    found = digests(2, [5] * 40)
    assert len(set(found)) == len(found)
