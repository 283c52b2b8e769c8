"""Pins: what is held and given back, without vLLM. Blocks are small integers, times are given."""

from __future__ import annotations

import random
from typing import Any

import pytest

from helium_proxy.vllm_plugin import pins
from helium_proxy.vllm_plugin.pins import BadDirective, Change, Directive, PinLedger, parse_directive


def anything(block: int) -> bool:
    return True


class TestDirectives:
    @pytest.mark.parametrize(
        ("raw", "parsed"),
        [
            ({}, Directive("report")),
            ({"pin": "a"}, Directive("pin", "a")),
            ({"pin": "a", "tokens": 64, "ttl_s": 2, "worth": 0}, Directive("pin", "a", 64, 2.0, 0.0)),
            ({"pin": "a", "tokens": None, "ttl_s": None}, Directive("pin", "a")),
            ({"renew": "a", "ttl_s": 0.5}, Directive("renew", "a", None, 0.5)),
            ({"unpin": "a" * 256}, Directive("unpin", "a" * 256)),
        ],
    )
    def test_good(self, raw: object, parsed: Directive) -> None:
        assert parse_directive(raw) == parsed

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (None, "must be an object"),
            (["pin"], "must be an object"),
            ({"tokens": 5}, "exactly one of"),
            ({"pin": "a", "unpin": "a"}, "exactly one of"),
            ({"pin": ""}, "1 to 256"),
            ({"pin": "a" * 257}, "1 to 256"),
            ({"pin": 7}, "1 to 256"),
            ({"pin": "a", "tokens": 0}, "tokens"),
            ({"pin": "a", "tokens": 1.5}, "tokens"),
            ({"pin": "a", "tokens": True}, "tokens"),
            ({"pin": "a", "ttl_s": 0}, "ttl_s must be a positive"),
            ({"pin": "a", "ttl_s": float("nan")}, "ttl_s"),
            ({"pin": "a", "ttl_s": "60"}, "ttl_s"),
            ({"pin": "a", "worth": -1}, "worth must be a non-negative"),
            ({"pin": "a", "worth": float("inf")}, "worth"),
            ({"pin": "a", "tll_s": 5}, "does not take 'tll_s'"),
            ({"unpin": "a", "ttl_s": 5}, "does not take 'ttl_s'"),
            ({"renew": "a", "tokens": 5}, "does not take 'tokens'"),
            ({"pin": "a", 5: 5}, "does not take '5'"),
        ],
    )
    def test_bad(self, raw: object, message: str) -> None:
        with pytest.raises(BadDirective, match=message):
            parse_directive(raw)


class TestBudget:
    def test_a_pin_holds_its_blocks_and_unpin_gives_them_back(self) -> None:
        ledger = PinLedger(4)
        assert ledger.pin("a", [1, 2, 3], now=0) == Change(hold=(1, 2, 3))
        assert ledger.pinned_blocks == 3
        assert ledger.unpin("a") == Change(release=(1, 2, 3))
        assert ledger.statistics() == pins.PinStatistics(0, 0, 4, 1, 0, 0, 0, 0)

    def test_shared_blocks_count_once_and_stay_until_the_last_pin_goes(self) -> None:
        ledger = PinLedger(4)
        ledger.pin("head", [1, 2], now=0)
        assert ledger.pin("whole", [1, 2, 3, 4], now=0) == Change(hold=(3, 4))
        assert ledger.pinned_blocks == 4
        assert ledger.unpin("head") == Change()
        assert ledger.unpin("whole") == Change(release=(1, 2, 3, 4))

    def test_a_prefix_over_the_budget_is_refused_and_changes_nothing(self) -> None:
        ledger = PinLedger(2)
        ledger.pin("a", [1], now=0)
        with pytest.raises(BadDirective, match="3 blocks are over the budget of 2"):
            ledger.pin("b", [2, 3, 4], now=0, worth=9)
        assert ledger.held_blocks() == (1,)

    def test_equal_worth_does_not_displace(self) -> None:
        ledger = PinLedger(2)
        ledger.pin("a", [1, 2], now=0)
        with pytest.raises(BadDirective, match="0 of 2 are free"):
            ledger.pin("b", [3], now=1)
        assert ledger.get("a") is not None

    def test_more_worth_displaces_the_least_worth_only(self) -> None:
        ledger = PinLedger(4)
        ledger.pin("good", [1, 2], now=0, worth=3)
        ledger.pin("poor", [3, 4], now=0, worth=0.5)
        assert ledger.pin("new", [5], now=1) == Change(hold=(5,), release=(3, 4))
        assert ledger.get("poor") is None
        assert ledger.statistics().evicted == 1

    def test_displacing_is_all_or_nothing(self) -> None:
        ledger = PinLedger(4)
        ledger.pin("good", [1, 2, 3], now=0, worth=3)
        ledger.pin("poor", [4], now=0, worth=0.5)
        with pytest.raises(BadDirective):
            ledger.pin("new", [5, 6], now=1)
        assert ledger.pinned_blocks == 4

    def test_a_name_is_replaced_within_the_budget(self) -> None:
        ledger = PinLedger(3)
        ledger.pin("a", [1, 2, 3], now=0)
        assert ledger.pin("a", [1, 4, 5], now=1) == Change(hold=(4, 5), release=(2, 3))
        assert len(ledger) == 1

    def test_names_are_bounded_even_where_blocks_are_shared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pins, "MAX_PINS", 3)
        ledger = PinLedger(8)
        for name in "abc":
            ledger.pin(name, [1], now=0)
        with pytest.raises(BadDirective, match="3 pins already"):
            ledger.pin("d", [1], now=0)
        ledger.pin("a", [2], now=0)

    def test_a_zero_budget_refuses_everything(self) -> None:
        with pytest.raises(BadDirective, match="budget of 0"):
            PinLedger(0).pin("a", [1], now=0)


class TestTime:
    def test_a_pin_expires_at_its_time(self) -> None:
        ledger = PinLedger(8)
        ledger.pin("a", [1], now=0, ttl_s=10)
        ledger.pin("b", [2], now=0, ttl_s=20)
        assert ledger.expire(9.9) == Change()
        assert ledger.expire(10) == Change(release=(1,))
        assert ledger.statistics().expired == 1
        assert ledger.expire(1e9) == Change(release=(2,))

    def test_renew_restarts_the_time(self) -> None:
        ledger = PinLedger(8)
        ledger.pin("a", [1], now=0, ttl_s=10)
        ledger.renew("a", now=8, ttl_s=10)
        assert ledger.expire(17) == Change()
        assert ledger.expire(18) == Change(release=(1,))

    def test_default_and_longest_time(self) -> None:
        ledger = PinLedger(8, default_ttl_s=30, max_ttl_s=60)
        ledger.pin("a", [1], now=0)
        ledger.pin("b", [2], now=0, ttl_s=1e9)
        assert ledger.expire(30) == Change(release=(1,))
        assert ledger.expire(60) == Change(release=(2,))

    @pytest.mark.parametrize("action", ["renew", "unpin"])
    def test_an_unknown_name_is_an_error(self, action: str) -> None:
        ledger = PinLedger(8)
        with pytest.raises(BadDirective, match="no pin is named 'a'"):
            ledger.renew("a", now=0) if action == "renew" else ledger.unpin("a")


class TestPressure:
    def test_the_least_worth_goes_first_and_no_more_than_needed(self) -> None:
        ledger = PinLedger(9)
        for name, blocks, worth in (("a", [1, 2, 3], 3.0), ("b", [4, 5, 6], 1.0), ("c", [7, 8, 9], 2.0)):
            ledger.pin(name, blocks, now=0, worth=worth)
        assert ledger.relieve(2, anything).release == (4, 5, 6)
        assert ledger.relieve(4, anything).release == (7, 8, 9, 1, 2, 3)
        assert ledger.statistics().evicted == 3

    def test_among_equals_the_longest_unused_goes_first(self) -> None:
        ledger = PinLedger(9)
        ledger.pin("a", [1], now=0, tail="A")
        ledger.pin("b", [2], now=1, tail="B")
        assert ledger.use(["A", "x"], now=2) == 1
        assert ledger.relieve(1, anything).release == (2,)

    def test_a_pin_that_gains_nothing_is_kept(self) -> None:
        ledger = PinLedger(9)
        ledger.pin("in use", [1, 2], now=0, worth=0.1)
        ledger.pin("idle", [3], now=0, worth=5)
        assert ledger.relieve(1, lambda block: block == 3).release == (3,)
        assert ledger.relieve(1, lambda block: block == 3) == Change()
        assert ledger.get("in use") is not None

    def test_nested_pins_give_up_their_own_part_first(self) -> None:
        ledger = PinLedger(9)
        ledger.pin("head", [1, 2], now=0, worth=1)
        ledger.pin("whole", [1, 2, 3], now=0, worth=2)
        assert ledger.relieve(1, anything).release == (3,)
        assert ledger.relieve(1, anything).release == (1, 2)

    def test_no_shortage_costs_no_pin(self) -> None:
        ledger = PinLedger(9)
        ledger.pin("a", [1], now=0)
        assert ledger.relieve(0, anything) == Change()

    def test_use_is_of_the_whole_prefix(self) -> None:
        ledger = PinLedger(9)
        ledger.pin("a", [1, 2], now=0, tail="h2")
        assert ledger.use(["h1"], now=1) == 0
        assert ledger.use(["h1", "other"], now=1) == 0
        assert ledger.use(["h1", "h2", "h3"], now=1) == 1
        assert ledger.statistics().hits == 1


def test_random_directives_keep_the_books() -> None:
    """After any sequence: references are exactly the union of the pins, within the budget; all comes back."""
    rng = random.Random(7)
    ledger = PinLedger(12, default_ttl_s=5)
    references: set[int] = set()

    def apply(change: Change) -> None:
        assert not references.intersection(change.hold)
        assert references.issuperset(change.release)
        references.update(change.hold)
        references.difference_update(change.release)

    for step in range(4000):
        now, name, start = step / 10, rng.choice("abcdefgh"), rng.choice([0, 20, 40, 60])
        action = rng.randrange(6)
        try:
            if action <= 2:
                blocks = range(start, start + rng.randint(1, 14))
                apply(ledger.pin(name, blocks, now, ttl_s=rng.choice([None, 0.3, 50]), worth=rng.randint(0, 3)))
            elif action == 3:
                ledger.renew(name, now)
            elif action == 4:
                apply(ledger.unpin(name))
            else:
                apply(ledger.relieve(rng.randint(0, 6), lambda block: block % 3 > 0))
        except BadDirective:
            ledger.refuse()
        apply(ledger.expire(now))
        assert references == set(ledger.held_blocks())
        assert ledger.pinned_blocks <= ledger.budget_blocks
    apply(ledger.clear())
    assert not references
    stats = ledger.statistics()
    assert min(stats.pinned, stats.refused, stats.expired, stats.evicted) > 50


def test_a_ledger_shows_itself_in_one_line() -> None:
    ledger = PinLedger(5)
    ledger.pin("a", [1, 2], now=0)
    assert repr(ledger) == "<PinLedger 1 pins, 2/5 blocks>"


def test_every_visible_change_has_a_new_version() -> None:
    ledger = PinLedger(5)
    seen: list[Any] = []
    for act in (
        lambda: ledger.pin("a", [1], now=0, tail="t"),
        lambda: ledger.use(["t"], now=1),
        ledger.refuse,
        lambda: ledger.unpin("a"),
    ):
        act()
        seen.append((ledger.version, ledger.statistics()))
    assert len({version for version, _ in seen}) == len(seen)
