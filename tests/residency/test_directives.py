"""What is pinned where, and when: with values alone."""

from __future__ import annotations

import pytest

from helium_proxy.residency.directives import (
    MEMORY_S,
    Pin,
    PinBook,
    Prefix,
    Prefixes,
    busiest,
    choose,
    common,
    name_of,
)
from helium_proxy.residency.index import Chain, WorkerResidency

KEY = ("t", "node", "demo")


def chain(*blocks: int) -> tuple[int, ...]:
    return blocks


def prefix(name: str, uses_s: float, *blocks: int) -> Prefix:
    return Prefix(name, blocks, uses_s)


def used(prefixes: Prefixes, worker: str = "w", now: float = 0.0, least_blocks: int = 1) -> dict[str, Chain]:
    found = prefixes.used_on(worker, now, least_blocks=least_blocks, least_uses_s=0.5 / MEMORY_S)
    return {p.name: p.chain for p in found}


# -- what is static


def test_static_is_what_runs_have_in_common() -> None:
    prefixes = Prefixes()
    prefixes.learn(KEY, "r1", chain(1, 2, 3, 4), "w", 0.0)
    assert prefixes.static(KEY) is None, "one run shows nothing"
    prefixes.learn(KEY, "r1", chain(1, 2, 3, 5), "w", 0.0)
    assert prefixes.static(KEY) is None, "nor do two calls of it"
    prefixes.learn(KEY, "r2", chain(1, 2, 6), "w", 0.0)
    found = prefixes.static(KEY)
    assert found is not None
    assert found.chain == (1, 2)
    assert used(prefixes) == {name_of(KEY): (1, 2)}


def test_a_branch_within_a_run_shortens_it() -> None:
    prefixes = Prefixes()
    for run, blocks in (("r1", (1, 2, 3)), ("r2", (1, 2, 3)), ("r2", (1, 9))):
        prefixes.learn(KEY, run, blocks, "w", 0.0)
    found = prefixes.static(KEY)
    assert found is not None
    assert found.chain == (1,)


def test_a_changed_prompt_is_learned_anew() -> None:
    prefixes = Prefixes()
    for run in range(4):
        prefixes.learn(KEY, f"old{run}", chain(1, 2, 3, 100 + run), "w", 0.0)
    prefixes.learn(KEY, "new0", chain(7, 8, 9, 200), "w", 0.0)
    assert prefixes.static(KEY) is None
    for run in range(1, 9):
        prefixes.learn(KEY, f"new{run}", chain(7, 8, 9, 200 + run), "w", 0.0)
    found = prefixes.static(KEY)
    assert found is not None
    assert found.chain == (7, 8, 9)


def test_uses_are_counted_by_worker_and_fade() -> None:
    prefixes = Prefixes()
    for run in range(4):
        prefixes.learn(KEY, str(run), chain(1, 2, run + 10), "a" if run else "b", float(run))
    (a,) = prefixes.used_on("a", 4.0, least_blocks=1, least_uses_s=0.0, without={"of another workflow"})
    (b,) = prefixes.used_on("b", 4.0, least_blocks=1, least_uses_s=0.0)
    assert a.uses_s == pytest.approx(3 / MEMORY_S, rel=0.01)
    assert b.uses_s == pytest.approx(1 / MEMORY_S, rel=0.01)
    assert used(prefixes, "a", 4.0 + MEMORY_S) != {}
    assert used(prefixes, "a", 4.0 + 2 * MEMORY_S) == {}, "the template has gone cold"
    assert used(prefixes, "a", 4.0, least_blocks=3) == {}, "too short"
    assert used(prefixes, "elsewhere", 4.0) == {}


def test_tables_are_bounded() -> None:
    prefixes = Prefixes(limit=3)
    for i in range(10):
        prefixes.learn(("t", str(i), "demo"), "r", tuple(range(10_000)), "w", 0.0)
    assert len(prefixes) == 3
    for i in range(100):
        prefixes.learn(("t", "9", "demo"), f"r{i}", tuple(range(10_000)), f"w{i}", float(i))
    found = prefixes.static(("t", "9", "demo"))
    assert found is not None
    assert len(found.chain) == 4096
    assert used(prefixes, "w0", 100.0) == {}, "of 64 workers the latest"
    assert used(prefixes, "w99", 100.0) != {}


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [((), (1,), 0), ((1, 2), (1, 2, 3), 2), ((1, 2, 3), (4, 5, 6), 0), ((1, 2, 3, 4), (1, 2, 3, 5), 3)],
)
def test_common(one: tuple[int, ...], other: tuple[int, ...], shared: int) -> None:
    assert common(one, other) == common(other, one) == shared


def test_names_are_one_key_s_alone() -> None:
    keys = [("t", "a", "m"), ("t", "a", "n"), ("u", "a", "m"), ("t", "b", "m"), ("t" * 300, "a" * 300, "m")]
    names = {name_of(key) for key in keys}
    assert len(names) == len(keys)
    assert max(map(len, names)) <= 256


# -- what is chosen


def test_the_budget_goes_to_the_most_used() -> None:
    pins = choose([prefix("rare", 1, 1, 2, 3), prefix("often", 5, 4, 5, 6)], 3, 0.1)
    assert [(p.name, p.worth) for p in pins] == [("often", pytest.approx(0.5))]


def test_shared_blocks_count_once_and_for_all_who_share_them() -> None:
    shared = [prefix(f"s{i}", 1, 1, 2, 10 + i) for i in range(3)]
    pins = choose([*shared, prefix("alone", 2, 20, 21, 22)], 5, 1.0)
    assert {p.name for p in pins} == {"s0", "s1", "s2"}, "two shared blocks and three of their own"
    assert pins[0].worth == pytest.approx((3 + 3 + 1) / 3)


def test_the_last_one_is_cut_to_what_is_left() -> None:
    pins = choose([prefix("a", 2, 1, 2), prefix("b", 1, 3, 4, 5, 6)], 4, 1.0)
    assert {p.name: p.chain for p in pins} == {"a": (1, 2), "b": (3, 4)}
    pins = choose([prefix("a", 2, 1, 2, 7), prefix("b", 1, 3, 4, 5, 6)], 5, 1.0, least_blocks=3)
    assert [p.name for p in pins] == ["a"], "the rest of the other is not worth a directive"


@pytest.mark.parametrize("budget", range(12))
def test_the_budget_is_never_exceeded(budget: int) -> None:
    prefixes = [prefix(str(i), i % 4, *range(i % 3, i % 3 + 1 + i)) for i in range(8)]
    pins = choose(prefixes, budget, 1.0)
    assert len({b for p in pins for b in p.chain}) <= budget
    assert choose([], budget, 1.0) == []


def test_planning_looks_at_the_busiest_alone() -> None:
    many = [prefix(str(i), float(i), *range(10 * i, 10 * i + 10)) for i in range(100)]
    assert [p.name for p in busiest(many, 25)] == ["99", "98", "97"]
    assert busiest(many, 0) == []


# -- what is said


def book(*pins: Pin, ttl_s: float = 100.0) -> PinBook:
    made = PinBook(ttl_s)
    made.plan(pins, 0.0)
    return made


PIN = Pin("p", (1, 2, 3), 0.5)


def test_a_pin_is_sent_once_and_again_before_it_lapses() -> None:
    pins = book(PIN)
    assert pins.directive("p", 16, 0.0) == {"pin": "p", "tokens": 48, "ttl_s": 100.0, "worth": 0.5}
    assert pins.directive("p", 16, 0.0) is None, "its siblings leave it be"
    assert pins.directive("other", 16, 0.0) is None
    assert pins.obeyed("p") == (1, 2, 3)
    assert pins.directive("p", 16, 40.0) is None
    assert pins.directive("p", 16, 60.0) is not None
    pins.plan([Pin("p", (1, 2), 0.5)], 61.0)
    again = pins.directive("p", 16, 61.0)
    assert again is not None
    assert again["tokens"] == 32, "the prefix has changed"


def test_a_refused_pin_is_not_asked_for_at_once() -> None:
    pins = book(PIN)
    pins.directive("p", 16, 0.0)
    pins.refused("p", 0.0)
    pins.plan([PIN], 5.0)
    assert pins.directive("p", 16, 5.0) is None
    pins.plan([PIN], 11.0)
    assert pins.directive("p", 16, 11.0) is not None


def test_a_failed_call_leaves_no_pin_behind() -> None:
    pins = book(PIN)
    pins.directive("p", 16, 0.0)
    pins.forget("p")
    assert not pins.held("p")
    assert pins.directive("p", 16, 0.0) is not None
    pins.obeyed("p")
    pins.forget("p")
    assert pins.held("p"), "an earlier one had pinned it"


def test_pins_lapse_are_renewed_and_given_back() -> None:
    pins = book(PIN)
    pins.directive("p", 16, 0.0)
    assert pins.renewals(90.0) == [], "nobody knows yet whether it holds"
    pins.obeyed("p")
    assert pins.renewals(50.0) == []
    assert pins.renewals(70.0) == [PIN]
    pins.renewed("p", 70.0)
    assert pins.renewals(71.0) == []
    assert pins.plan([], 100.0) == []
    assert pins.surplus() == ["p"]
    assert pins.plan([], 170.0) == ["p"]
    assert not pins.held("p")


def test_a_surplus_pin_is_given_back_along_with_one_call() -> None:
    pins = book(PIN)
    assert pins.give_back() is None
    pins.directive("p", 16, 0.0)
    pins.plan([], 1.0)
    assert pins.give_back() is None, "nobody knows yet whether it holds"
    pins.obeyed("p")
    assert pins.give_back() == {"unpin": "p"}
    assert pins.give_back() is None, "one call says so"
    pins.kept("p")
    assert pins.give_back() == {"unpin": "p"}, "that call failed"
    pins.dropped("p")
    pins.kept("p")
    assert pins.give_back() is None


def test_a_restart_takes_all() -> None:
    pins = book(PIN)
    pins.directive("p", 16, 0.0)
    pins.obeyed("p")
    pins.clear()
    assert pins.directive("p", 16, 1.0) is not None


# -- the mirror


def test_pinned_blocks_outlive_a_flood() -> None:
    mirror = WorkerResidency(10)
    mirror.admit("a", (1, 2, 3), 0)
    mirror.finish("a")
    mirror.pin("p", (1, 2, 3))
    for i in range(50):
        mirror.admit(f"x{i}", (100 + i, 200 + i), 1)
        mirror.finish(f"x{i}")
    assert mirror.match((1, 2, 3)) == 3
    assert mirror.pinned == 3
    assert mirror.used == 0, "no running call holds them"
    mirror.unpin("p")
    for i in range(50, 60):
        mirror.admit(f"x{i}", (100 + i, 200 + i), 1)
        mirror.finish(f"x{i}")
    assert mirror.match((1, 2, 3)) == 0
    assert mirror.pinned == 0


def test_pins_that_share_blocks_let_go_one_by_one() -> None:
    mirror = WorkerResidency(4)
    mirror.pin("p", (1, 2))
    mirror.pin("q", (1, 3))
    assert mirror.pinned == 3
    mirror.unpin("p")
    assert mirror.pins() == {"q": 2}
    mirror.admit("x", (7, 8, 9), 0)
    assert mirror.match((1, 3)) == 2, "these stay pinned"


def test_a_followed_mirror_is_what_events_say() -> None:
    mirror, told = WorkerResidency(10), dict[int, None]()
    mirror.admit("guess", (4, 8), 0, exact=True)
    mirror.finish("guess")
    mirror.follow(told)
    assert mirror.match((4, 8)) == 0, "guesses are void"
    told.update(dict.fromkeys((4, 8)))
    mirror.stored((4, 8))
    assert mirror.match((4, 8, 12)) == 2
    mirror.admit("a", (4, 8, 12), 1, exact=True)
    assert mirror.match((4, 8, 12)) == 3, "running"
    mirror.finish("a")
    assert mirror.match((4, 8, 12)) == 3, "its event is on the way"
    mirror.settle()
    mirror.settle()
    assert mirror.match((4, 8, 12)) == 2, "it never came"
    for i in range(40):  # more than fits: events would tell
        mirror.admit(f"x{i}", (101 + i,), 0, exact=True)
        mirror.finish(f"x{i}")
    assert mirror.match((4, 8)) == 2
    del told[8]
    mirror.dropped((8,))
    assert mirror.match((4, 8)) == 1


def test_text_chains_are_guessed_on_though_events_are_followed() -> None:
    mirror = WorkerResidency(4)
    mirror.follow({})
    mirror.admit("a", (1, 2), 0)
    mirror.finish("a")
    mirror.settle()
    mirror.settle()
    assert mirror.match((1, 2)) == 2
    mirror.admit("b", (3, 4, 5), 0)
    assert mirror.match((1, 2)) == 1


def test_a_renewal_that_fails_leaves_what_was_pinned_until_it_lapses() -> None:
    """Else the mirror would hold its blocks for ever: only a pin that lapses is given up there."""
    for fails in ("forget", "refused"):
        pins = book(PIN)
        pins.directive("p", 16, 0.0)
        pins.obeyed("p")
        assert pins.directive("p", 16, 60.0) is not None
        pins.forget("p") if fails == "forget" else pins.refused("p", 60.0)
        assert pins.held("p")
        assert pins.plan([PIN], 99.0) == []
        assert pins.plan([PIN], 101.0) == ["p"]
