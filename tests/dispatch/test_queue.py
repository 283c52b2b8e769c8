"""Lanes: what they share, whose turn it is, and that nothing gets lost between them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from helium_proxy.dispatch.calls import QueuedCall
from helium_proxy.dispatch.queue import Queue, depths


def call(name: str, chain: tuple[int, ...] = (), rank: int = 0, **fields: str) -> QueuedCall:
    made = QueuedCall(name, "demo", fields.pop("tenant", "t"), chain, 16, 16 * len(chain) + 5, 10.0, 0.0, **fields)
    made.rank = (0, 0.0, 0, 0.0, rank)
    return made


@given(st.integers(0, 5000))
def test_chains_are_compared_at_few_places_that_are_close(length: int) -> None:
    places = depths(length)
    assert list(places) == sorted(set(places))
    assert places[-1:] == ((length,) if length else ())
    assert len(places) < 80
    assert all(late - early <= max(1, early // 8) for early, late in pairwise(places))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_a_lane_knows_what_its_calls_share(common: int, mine: int, theirs: int) -> None:
    queue, prefix = Queue(), tuple(range(common))
    one = call("a", prefix + tuple(range(10_000, 10_000 + mine)))
    queue.push(one)
    queue.place(one, "w", 0b10)
    found = queue.shared(prefix + tuple(range(20_000, 20_000 + theirs)), 0b110)
    assert sum(lanes for _, lanes in found) == 0b110
    shared = next(blocks for blocks, lanes in found if lanes & 0b10)
    assert shared <= common
    assert shared >= common - max(1, common // 8), "an eighth too few at most"
    assert next(blocks for blocks, lanes in found if lanes & 0b100) == 0


def test_a_lane_forgets_what_has_left() -> None:
    queue, one = Queue(), call("a", tuple(range(40)))
    queue.push(one)
    assert len(queue) == 1
    queue.place(one, "w", 1)
    assert queue.shared(one.chain, 1) == [(40, 1)]
    assert queue.work("w") == one.lane_work
    assert queue.remove(one)
    assert not queue.remove(one)
    assert queue.shared(one.chain, 1) == [(0, 1)]
    assert not queue.lanes["w"]
    assert len(queue) == 0


def test_a_closed_lane_s_calls_are_placed_anew() -> None:
    queue = Queue()
    calls = [call(f"c{i}", (i,), i) for i in range(5)]
    for one in calls:
        queue.push(one)
        queue.place(one, "w0", 1)
    assert not queue.unplaced
    queue.close("w0")
    queue.close("never")
    assert list(queue.unplaced.values()) == calls
    assert len(queue) == 5
    assert queue.shared((0,), 1) == [(0, 1)]
    queue.place(calls[0], "w1", 2)
    assert list(queue.lanes["w1"]) == [calls[0]]
    assert sorted(queue.shared((0,), 3)) == [(0, 1), (1, 2)]


def test_workflows_of_a_tenant_take_turns_by_what_they_were_given() -> None:
    queue = Queue()
    for name, group in (("a", "large"), ("b", "small"), ("c", "large")):
        one = call(name, (), ord(name), group=group)
        queue.push(one)
        queue.place(one, "w", 1)
    lane = queue.lanes["w"]
    (first, *_) = queue.turn(lane)
    queue.charge(first[1], 5.0)
    (second, *_) = queue.turn(lane)
    assert {first[1].group, second[1].group} == {"large", "small"}


def test_workflows_without_a_name_take_turns_as_one() -> None:
    queue = Queue()
    waiting = [call(f"{i}", rank=i, group=f"~part-{i % 3}", share="~") for i in range(6)]
    named = call("named", rank=9, group="named")
    for one in [*waiting, named]:
        queue.push(one)
        queue.place(one, "w", 0b1)
    order = []
    while lane := queue.lanes.get("w"):
        if not lane:
            break
        first = queue.turn(lane)[0][1]
        order.append(first.id)
        queue.remove(first)
        queue.charge(first, 10.0)
    assert order[:2] in (["named", "0"], ["0", "named"]), "they take turns with the named one"
    assert [name for name in order if name != "named"] == ["0", "1", "2", "3", "4", "5"]


def test_beyond_a_number_of_workflows_the_others_of_a_tenant_take_turns_as_one() -> None:
    queue = Queue()
    calls = [call(f"{i}", rank=i, group=f"workflow {i}") for i in range(1_000)]
    other = call("other", group="its own", tenant="u")
    for one in [*calls, other]:
        queue.push(one)
        queue.place(one, "w", 1)
    assert len(queue.lanes["w"].groups) == 256 + 1 + 1
    assert other.turns == ("u", "its own")
    for one in [*calls, other]:
        assert queue.remove(one)
    assert len(queue) == 0
    assert not queue._waiting
    assert not queue._turns
    again = call("again", group="workflow 999")
    queue.push(again)
    assert again.turns == ("t", "workflow 999"), "there is room for its own turn again"
