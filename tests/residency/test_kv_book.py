"""KV events without a network: sequence, copies, and the mapping to this proxy's own chain hashes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from helium_proxy.residency.chain import token_chain
from helium_proxy.residency.kv_book import (
    BlockView,
    Cleared,
    Event,
    EventBook,
    NeedReplay,
    Removed,
    Stored,
    salt_of,
)

BLOCK = 4


def stored(
    hashes: list[int], parent: int | None = None, tokens: Iterable[int] | None = None, **more: Any
) -> dict[str, Any]:
    ids = list(tokens) if tokens is not None else [h * 10 + i for h in hashes for i in range(BLOCK)]
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": ids}
    return {**event, "block_size": BLOCK, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0, **more}


def removed(*hashes: int, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": 0, **more}


def cleared() -> dict[str, Any]:
    return {"type": "AllBlocksCleared"}


def batch(number: int, *events: dict[str, Any], life: float = 0.0) -> tuple[int, bytes]:
    return number, msgspec.msgpack.encode([life + number, list(events), 0])


def started(*batches: tuple[int, bytes]) -> EventBook:
    """A book that joined an engine with this history."""
    book = EventBook()
    assert book.resync() == NeedReplay(0)
    events = book.replayed(batches)
    assert not isinstance(events, NeedReplay)
    list(events)
    return book


def replay(book: EventBook, engine: list[tuple[int, bytes]] | None, wanted: object) -> list[Event]:
    """Answer `wanted` from an engine's buffer until the book is content."""
    result: object = wanted
    asked = 0
    while isinstance(result, NeedReplay):
        start = result.start
        result = book.replayed(None if engine is None else [b for b in engine if b[0] >= start])
        asked += 1
        assert asked <= 2
    return list(result)  # type: ignore[call-overload, no-any-return]


# -- sequence


def test_events_in_order() -> None:
    book = started()
    assert book.live(*batch(0, stored([1, 2]))) == [
        Stored((1, 2), None, array("I", [10, 11, 12, 13, 20, 21, 22, 23]), BLOCK)
    ]
    assert book.live(*batch(1, removed(2), stored([3], 1))) == [
        Removed((2,)),
        Stored((3,), 1, array("I", [30, 31, 32, 33]), BLOCK),
    ]
    assert (1 in book, 2 in book, 3 in book) == (True, False, True)
    assert book.statistics().applied == 2


def test_joining_takes_the_history_and_skips_what_comes_twice() -> None:
    book = started(batch(0, stored([1])), batch(1, stored([2], 1)))
    assert book.statistics().blocks == 2
    assert book.live(*batch(0, stored([1]))) == []
    assert book.live(*batch(1, stored([2], 1))) == []
    assert book.live(*batch(2, removed(2))) == [Removed((2,))]


def test_a_gap_is_replayed_and_the_batch_that_showed_it_is_taken_once() -> None:
    engine = [batch(i, stored([i])) for i in range(6)]
    book = started(*engine[:2])
    wanted = book.live(*engine[5])
    assert wanted == NeedReplay(1), "one batch more than is missing, to recognise the engine"
    events = replay(book, engine, wanted)
    assert [event.hashes for event in events if isinstance(event, Stored)] == [(2,), (3,), (4,), (5,)]
    assert book.live(*batch(6, removed(5))) == [Removed((5,))]
    assert (book.statistics().gaps, book.statistics().resets) == (1, 0)


def test_a_gap_the_engine_no_longer_remembers_clears() -> None:
    engine = [batch(i, stored([i])) for i in range(100)]
    book = started(*engine[:2])
    events = replay(book, engine[90:], book.live(*engine[99]))
    assert events[0] == Cleared("lost")
    assert len(events) == 11
    assert (1 in book, 95 in book) == (False, True)


@pytest.mark.parametrize("answer", ["timeout", "hole"])
def test_a_gap_that_cannot_be_filled_clears(answer: str) -> None:
    engine = [batch(i, stored([i])) for i in range(10)]
    book = started(*engine[:2])
    source = None if answer == "timeout" else [engine[1], *engine[7:9]]
    events = replay(book, source, book.live(*engine[9]))
    assert Cleared("lost") in events
    assert (1 in book, 9 in book) == (False, True)


def test_a_restarted_engine_is_known_by_its_numbers() -> None:
    book = started(*(batch(i, stored([i])) for i in range(5)))
    book.live(*batch(5, stored([5])))
    after = [batch(0, stored([70]), life=1.0), batch(1, stored([71], 70), life=1.0)]
    events = replay(book, after, book.live(*after[1]))
    assert events[0] == Cleared("restart")
    assert [event.hashes for event in events[1:] if isinstance(event, Stored)] == [(70,), (71,)]
    assert book.live(*batch(2, stored([72], 71), life=1.0)) != []


def test_a_restarted_engine_that_counted_past_us_is_known_by_its_last_batch() -> None:
    book = started(*(batch(i, stored([i])) for i in range(3)))
    after = [batch(i, stored([70 + i]), life=1.0) for i in range(9)]
    events = replay(book, after, book.resync())
    assert events[0] == Cleared("restart")
    assert len(events) == 10
    assert (2 in book, 78 in book) == (False, True)


def test_a_restarted_engine_with_nothing_to_tell_yet() -> None:
    book = started(batch(0, stored([1])))
    assert replay(book, [], book.resync()) == [Cleared("restart")]
    assert book.live(*batch(0, stored([2]), life=1.0)) != []


def test_a_reconnection_to_the_same_engine_changes_nothing() -> None:
    engine = [batch(i, stored([i])) for i in range(3)]
    book = started(*engine)
    assert book.resync() == NeedReplay(2)
    assert replay(book, engine, book.resync()) == []
    assert book.live(*batch(3, removed(0))) == [Removed((0,))]


def test_quiet_checks_find_the_batch_that_was_missed_at_the_end() -> None:
    engine = [batch(i, stored([i])) for i in range(3)]
    book = started(*engine[:2])
    assert [e.hashes for e in replay(book, engine, book.resync()) if isinstance(e, Stored)] == [(2,)]


def test_without_replay_the_first_batch_is_the_start_and_a_gap_clears() -> None:
    book = EventBook()
    assert replay(book, None, book.resync()) == []
    assert book.live(*batch(57, stored([1]))) != []
    assert replay(book, None, book.resync()) == [], "a quiet check loses nothing"
    assert 1 in book
    assert replay(book, None, book.live(*batch(60, stored([2]))))[0] == Cleared("lost")
    assert (1 in book, 2 in book, book.statistics().gaps) == (False, True, 1)


def test_a_replay_that_times_out_after_a_strange_one_clears_and_goes_on() -> None:
    book = started(batch(0, stored([1])), batch(1, stored([2])))
    assert book.resync() == NeedReplay(1)
    assert book.replayed([]) == NeedReplay(0)
    events = book.replayed(None)
    assert not isinstance(events, NeedReplay)
    assert list(events) == [Cleared("lost")]
    assert book.live(*batch(40, stored([3]))) != [], "whatever comes next is the start"


# -- copies


def test_a_block_is_gone_with_its_last_copy() -> None:
    book = started()
    book.live(*batch(0, stored([1]), stored([1]), stored([1, 2])))
    assert book.live(*batch(1, removed(1))) == []
    assert book.live(*batch(2, removed(1))) == []
    assert book.live(*batch(3, removed(1, 2))) == [Removed((1, 2))]
    assert book.live(*batch(4, removed(1))) == [], "nor is it removed below zero"
    assert book.statistics().blocks == 0


def test_cleared_by_the_engine() -> None:
    book = started(batch(0, stored([1]), stored([1])))
    assert book.live(*batch(1, cleared(), stored([1]))) == [
        Cleared("engine"),
        Stored((1,), None, array("I", [10, 11, 12, 13]), BLOCK),
    ]
    assert book.live(*batch(2, removed(1))) == [Removed((1,))]


def test_a_history_is_whole_from_the_first_batch_or_an_empty_cache_on() -> None:
    def late(*events: dict[str, Any]) -> EventBook:
        return started(batch(7, stored([1])), batch(8, *events))

    assert not started().whole, "there is no history yet"
    assert started(batch(0, stored([1])), batch(1)).whole
    assert not late().whole
    assert late(cleared(), stored([2])).whole
    for number, whole in ((0, True), (3, False)):
        book = EventBook()
        assert replay(book, None, book.resync()) == []
        book.live(*batch(number, stored([1])))
        assert book.whole is whole, "without a replay"
    engine = [batch(i, stored([i])) for i in range(100)]
    book = started(*engine[:2])
    assert replay(book, engine[90:], book.live(*engine[99]))[0] == Cleared("lost")
    assert not book.whole
    book.live(*batch(100, cleared()))
    assert book.whole
    again = [batch(0, stored([1]), life=0.5), batch(1, life=0.5)]
    assert replay(book, again, book.live(*again[1]))[0] == Cleared("restart")
    assert book.whole


def test_memory_is_bounded() -> None:
    book = EventBook(max_blocks=10)
    view = BlockView("m", BLOCK)
    list(replay(book, [], book.resync()))
    for i in range(100):
        events = book.live(*batch(i, stored([i])))
        assert not isinstance(events, NeedReplay)
        for event in events:
            view.apply(event)
        assert book.statistics().blocks <= 10
        assert len(view) <= 10
    assert (99 in book, 90 in book, 89 in book) == (True, True, False)


def test_forget() -> None:
    book = started(batch(0, stored([1]), stored([1])))
    book.forget([1, 7])
    assert 1 not in book


# -- what is ignored


@pytest.mark.parametrize(
    "event",
    [
        stored([1], medium="CPU"),
        stored([1], medium="STORAGE"),
        stored([1], kv_cache_spec_kind="sliding_window"),
        stored([1], kv_cache_spec_kind="mamba"),
        {"type": "SomethingNew", "x": 1},
        {"type": "BlockStored", "block_hashes": "no"},
        {"no": "type"},
    ],
)
def test_other_media_other_groups_and_the_unknown_change_nothing(event: dict[str, Any]) -> None:
    book = started()
    events = book.live(*batch(0, event, stored([5])))
    assert not isinstance(events, NeedReplay)
    assert [e.hashes for e in events if isinstance(e, Stored)] == [(5,)], "what follows is taken in"


def test_of_several_groups_one_is_followed() -> None:
    book = started()
    book.live(*batch(0, stored([1], kv_cache_spec_kind="sliding_window", group_idx=0)))
    book.live(*batch(1, stored([1], kv_cache_spec_kind="full_attention", group_idx=1), stored([1], group_idx=2)))
    assert book.live(*batch(2, removed(1, group_idx=0), removed(1, group_idx=2))) == []
    assert book.live(*batch(3, removed(1, group_idx=1))) == [Removed((1,))]


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode([1])])
def test_a_batch_that_is_not_understood_is_skipped_and_counted(payload: bytes) -> None:
    book = started()
    assert book.live(0, payload) == []
    assert book.statistics().undecodable == 1
    assert book.live(*batch(1, stored([1]))) != []


def test_hashes_may_be_whole_digests() -> None:
    book = started()
    event = {**stored([]), "block_hashes": [b"x" * 32], "token_ids": [1, 2, 3, 4]}
    (one,) = book.live(*batch(0, event))  # type: ignore[misc]
    assert one.hashes == (b"x" * 32,)


# -- the view


def prompt(length: int, seed: int = 1) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(8000) for _ in range(length)]


def told(view: BlockView, book: EventBook, number: int, *events: dict[str, Any]) -> None:
    result = book.live(*batch(number, *events))
    assert not isinstance(result, NeedReplay)
    for event in result:
        view.apply(event)


def test_a_prompt_is_resident_as_far_as_its_blocks_are() -> None:
    view, book = BlockView("m", BLOCK), started()
    tokens = prompt(18)
    told(view, book, 0, stored([1, 2], tokens=tokens[:8]))
    told(view, book, 1, stored([3, 4], 2, tokens=tokens[8:16]))
    assert view.resident_tokens(tokens) == 4
    assert view.resident_tokens(tokens[:10]) == 2
    assert view.resident_tokens([*tokens[:8], 9999, *tokens[9:]]) == 2
    assert view.resident_tokens(tokens[4:]) == 0, "the same tokens elsewhere in a prompt are another block"
    assert view.resident(token_chain(tokens, BLOCK, salt_of("m"))) == 4
    assert view.resident(token_chain(tokens, BLOCK, salt_of("another model"))) == 0
    told(view, book, 2, removed(4))
    assert view.resident_tokens(tokens) == 3
    told(view, book, 3, removed(2))
    assert view.resident_tokens(tokens) == 1, "block 3 is there but useless without block 2"
    told(view, book, 4, stored([2], 1, tokens=tokens[4:8]))
    assert view.resident_tokens(tokens) == 3, "and of use again"
    told(view, book, 5, cleared())
    assert (view.resident_tokens(tokens), len(view)) == (0, 0)


def test_changes_are_in_chain_hashes() -> None:
    view = BlockView("m", BLOCK)
    tokens = array("I", prompt(8))
    chain = token_chain(tokens, BLOCK, salt_of("m"))
    assert view.apply(Stored((1, 2), None, tokens, BLOCK)).stored == chain
    assert view.apply(Removed((2, 99))).dropped == chain[1:]
    assert view.apply(Cleared("engine")).cleared


def test_blocks_of_another_size_alone_fit_nothing() -> None:
    view, tokens = BlockView("m", BLOCK), array("I", prompt(8))
    assert view.fits, "nothing speaks against it"
    view.apply(Stored((1,), None, tokens, 2 * BLOCK))
    assert not view.fits
    view.apply(Cleared("engine"))
    assert not view.fits
    view.apply(Stored((1, 2), None, tokens, BLOCK))
    view.apply(Stored((3,), None, tokens[:2], 2))
    assert view.fits, "of several sizes, ours is the one"


def test_salts_and_adapters_are_apart() -> None:
    view, book = BlockView("m", BLOCK), started()
    tokens = prompt(8)
    told(view, book, 0, stored([1, 2], tokens=tokens, extra_keys=[["secret"], None]))
    assert (view.resident_tokens(tokens), view.resident_tokens(tokens, "secret")) == (0, 2)
    told(view, book, 1, stored([3], tokens=tokens[:4], lora_name="lo", extra_keys=[["lo"]]))
    told(view, book, 2, stored([4], 3, tokens=tokens[4:], lora_name="lo", extra_keys=[["lo"]]))
    assert view.resident(token_chain(tokens, BLOCK, salt_of("lo"))) == 2
    told(view, book, 3, stored([5], tokens=tokens[:4], lora_name="lo", extra_keys=[["lo", "secret"]]))
    assert view.resident(token_chain(tokens, BLOCK, salt_of("lo", "secret"))) == 1


@pytest.mark.parametrize(
    "event",
    [
        stored([1], extra_keys=[[["image", 0]]]),
        stored([1], extra_keys=[["salt", ["image", 0]]]),
        stored([1], 77),
        stored([1], tokens=range(8), block_size=8),
        stored([1, 2], tokens=range(4)),
    ],
    ids=["image", "salted image", "unknown parent", "other block size", "masked blocks"],
)
def test_blocks_that_cannot_be_told_from_tokens_are_counted_but_not_seen(event: dict[str, Any]) -> None:
    view, book = BlockView("m", BLOCK), started()
    told(view, book, 0, event, stored([9], 1, tokens=range(4)))
    assert 1 in book
    assert len(view) == 0, "nor are those that follow them"


@pytest.mark.parametrize("seed", range(20))
def test_any_delivery_gives_the_same_view(seed: int) -> None:
    """An engine's random history through a lossy network, with restarts, ends in the engine's own state."""
    chance = random.Random(seed)
    book, view = EventBook(), BlockView("m", BLOCK)
    prompts = [prompt(BLOCK * 6, seed=i) for i in range(5)]
    engine: list[tuple[int, bytes]] = []
    copies: dict[int, int] = {}
    life = 0.0

    def take(result: Iterable[Event]) -> None:
        for event in result:
            view.apply(event)

    for _ in range(300):
        if chance.random() < 0.02:  # the engine dies and comes back empty
            engine, copies, life = [], {}, life + 1000.0
        which = chance.randrange(5)
        first = chance.randrange(6)
        hashes = [which * 100 + i for i in range(6)]
        if chance.random() < 0.6:
            have = next((i for i in range(6) if hashes[i] not in copies), 6)
            begin = min(first, have)
            tokens = prompts[which][begin * BLOCK :]
            event = stored(hashes[begin:], hashes[begin - 1] if begin else None, tokens=tokens)
            for h in hashes[begin:]:
                copies[h] = copies.get(h, 0) + 1
        else:
            gone = [h for h in reversed(hashes) if h in copies][:2]
            event = removed(*gone)
            for h in gone:
                copies[h] -= 1
                if not copies[h]:
                    del copies[h]
        engine.append(batch(len(engine), event, life=life))
        if chance.random() < 0.8:  # delivered
            result = book.live(*engine[-1])
            take(replay(book, engine, result) if isinstance(result, NeedReplay) else result)
        elif chance.random() < 0.1:
            take(replay(book, engine, book.resync()))
    take(replay(book, engine, book.resync()))
    assert {h for h in range(500) if h in book} == set(copies)
    for which, tokens in enumerate(prompts):
        held = next((i for i in range(6) if which * 100 + i not in copies), 6)
        assert view.resident_tokens(tokens) == held
