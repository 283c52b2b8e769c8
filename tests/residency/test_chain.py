"""Chains of block hashes: equal prefixes, and nothing else, have equal hashes."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from helium_proxy.residency.chain import text_chain, token_chain

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(tokens, st.integers(1, 20))
def test_only_full_blocks_count(ids: list[int], size: int) -> None:
    chain = token_chain(ids, size)
    assert len(chain) == len(ids) // size
    assert chain == token_chain(array("I", ids), size)
    assert chain == token_chain(ids[: len(chain) * size], size)


@given(tokens, tokens, tokens)
def test_chains_agree_exactly_as_far_as_the_blocks_do(head: list[int], one: list[int], other: list[int]) -> None:
    size = 4
    a, b = token_chain(head + one, size), token_chain(head + other, size)
    blocks = [
        (head + one)[i : i + size] == (head + other)[i : i + size] for i in range(0, min(len(a), len(b)) * size, size)
    ]
    same = next((i for i, equal in enumerate(blocks) if not equal), len(blocks))
    assert a[:same] == b[:same]
    assert not set(a[same:]) & set(b[same:])


def test_salts_share_nothing() -> None:
    ids = list(range(64))
    assert not set(token_chain(ids, 16, "a")) & set(token_chain(ids, 16, "b"))
    assert not set(token_chain(ids, 16, "")) & set(token_chain(ids, 16, "b"))
    assert not set(text_chain(["x" * 64], 16, "a")) & set(text_chain(["x" * 64], 16, "b"))


def test_a_block_covers_what_came_before_it() -> None:
    assert not set(token_chain([1] * 64, 16)) & set(token_chain([2] + [1] * 63, 16))
    assert len(set(token_chain([1] * 64, 16))) == 4


@given(tokens, tokens)
def test_a_chain_can_be_continued(head: list[int], tail: list[int]) -> None:
    size = 4
    head = head[: len(head) // size * size]
    first = token_chain(head, size, "salt")
    if first:
        assert first + token_chain(tail, size, parent=first[-1]) == token_chain(head + tail, size, "salt")


def test_text_takes_anything_that_json_can_hold() -> None:
    assert len(text_chain(["é🙂\ud800" * 20], 16)) > 5
    assert text_chain([], 16) == ()
    assert text_chain(["ab", "c"], 1) != text_chain(["a", "bc"], 1), "where one message ends matters"
