"""Pins: what they hold, for how long, and what they give way to."""

from __future__ import annotations

from typing import Any

import pytest

from helium_proxy.engine import Request, Scheduler

from .test_scheduler import SIZE, drain, make, request


def pinned(s: Scheduler, id: str, tokens: int, directive: dict[str, Any], now: float = 0.0) -> dict[str, Any]:
    """Run a request of `tokens` prompt tokens, all of family `id`, carrying `directive`; its reply."""
    r = request(f"{id}-{s.counters.steps}", tokens, prefix=tokens, family=id)
    r.directive = directive
    s.add(r, now)
    drain(s, now)
    assert r.pin_reply is not None
    return r.pin_reply


def step_at(s: Scheduler, now: float, most: int) -> float:
    """One step, or run of steps; when it ended."""
    end = s.start(now, most)
    assert end is not None
    s.finish()
    return end


def cached(s: Scheduler, id: str, tokens: int) -> int:
    return len(s.pool.lookup(request("q", tokens + 1, prefix=tokens, family=id).hashes, 1 << 20)) * SIZE


def flood(s: Scheduler, now: float = 1.0) -> None:
    for i in range(4):
        s.add(request(f"flood{i}{now}", 24), now)
    drain(s, now)


def test_a_pin_survives_a_flood_and_its_release_does_not() -> None:
    s = make(blocks=16, pin_budget=0.5)
    assert pinned(s, "p", 16, {"pin": "a"}) == {"pinned_blocks": 4, "budget_blocks": 8}
    pinned(s, "u", 16, {})
    flood(s)
    assert (cached(s, "p", 16), cached(s, "u", 16)) == (16, 0)
    assert pinned(s, "x", 4, {"unpin": "a"}, 2.0)["pinned_blocks"] == 0
    flood(s, 3.0)
    assert cached(s, "p", 16) == 0


def test_tokens_bound_what_is_pinned_and_shared_blocks_count_once() -> None:
    s = make(blocks=16)
    assert pinned(s, "p", 18, {"pin": "a", "tokens": 9})["pinned_blocks"] == 2
    assert pinned(s, "p", 18, {"pin": "b"})["pinned_blocks"] == 4
    assert pinned(s, "p", 18, {"unpin": "b"})["pinned_blocks"] == 2
    assert pinned(s, "p", 18, {"pin": "a", "tokens": 4})["pinned_blocks"] == 1


def test_the_budget_holds_and_a_worthier_pin_takes_the_place_of_a_lesser() -> None:
    s = make(blocks=16, pin_budget=0.5)
    pinned(s, "a", 20, {"pin": "a"})
    reply = pinned(s, "b", 20, {"pin": "b"})
    assert reply["pinned_blocks"] == 5
    assert "budget" in reply["error"]
    assert pinned(s, "b", 20, {"pin": "b", "worth": 2})["pinned_blocks"] == 5
    assert s.pins.names() == ("b",)
    assert "error" in pinned(s, "c", 40, {"pin": "c", "worth": 9})


def test_pins_expire_and_can_be_renewed() -> None:
    s = make(blocks=16)
    pinned(s, "a", 8, {"pin": "a", "ttl_s": 10})
    pinned(s, "b", 8, {"pin": "b", "ttl_s": 10})
    assert pinned(s, "x", 4, {"renew": "a", "ttl_s": 50}, 5.0)["pinned_blocks"] == 4
    s.add(request("later", 4), 30.0)
    drain(s, 30.0)
    assert s.pins.names() == ("a",)


def test_pins_never_keep_a_request_from_running() -> None:
    s = make(blocks=8, pin_budget=1.0)
    pinned(s, "a", 16, {"pin": "a"})
    pinned(s, "b", 8, {"pin": "b", "worth": 5})
    assert s.pins.blocks == 6
    big = request("big", 20, 4)
    s.add(big, 1.0)
    drain(s, 1.0)
    assert big.state == "finished"
    assert s.pins.names() == ("b",)


def test_a_request_that_grows_into_the_pins_gets_their_room() -> None:
    s = make(blocks=8, pin_budget=1.0)
    pinned(s, "a", 16, {"pin": "a"})
    long = request("long", 7, 20)
    s.add(long, 1.0)
    drain(s, 1.0)
    assert (long.state, s.pins.names()) == ("finished", ())


@pytest.mark.parametrize("most", [1, 1 << 30])
def test_pins_delay_a_request_no_longer_than_patience(most: int) -> None:
    s = make(blocks=16, pin_budget=0.5)
    pinned(s, "a", 24, {"pin": "a"})
    s.add(request("runs", 8, 24), 10.0)
    now = step_at(s, 10.0, most)
    waits = request("waits", 36)  # 9 blocks; 10 are not pinned, but 2 and more of them are taken
    s.add(waits, now)
    while waits.state != "finished":
        now = step_at(s, now, most)
    assert waits.scheduled_at is not None
    assert 5.0 <= waits.scheduled_at - waits.arrival <= 7.0
    assert s.pins.names() == ()


def test_requests_that_go_first_do_not_renew_the_pins_patience() -> None:
    s = make(blocks=20, pin_budget=0.5, policy="priority")
    pinned(s, "a", 24, {"pin": "a"})
    s.add(request("runs", 8, 60), 10.0)
    now = step_at(s, 10.0, 1)
    waits = request("waits", 48, priority=1)  # 12 blocks; 14 are not pinned, but 2 and more of them are taken
    s.add(waits, now)
    while waits.scheduled_at is None:
        s.add(request(f"tiny{now}", 1, 1), now)
        now = step_at(s, now, 1)
        assert now < 30.0
    assert 5.0 <= waits.scheduled_at - waits.arrival <= 7.0
    assert s.pins.names() == ()


def test_a_reset_takes_pins_only_when_nothing_runs() -> None:
    s = make(blocks=16)
    pinned(s, "a", 8, {"pin": "a"})
    s.add(request("r", 4, 9), 1.0)
    now = step_at(s, 1.0, 1)
    assert not s.reset_prefix_cache()
    assert s.pins.names() == ("a",)
    drain(s, now)
    assert s.reset_prefix_cache()
    assert (s.pins.names(), s.pool.free) == ((), s.pool.capacity)


@pytest.mark.parametrize(
    "directive",
    [
        7,
        {"pin": "a", "tokens": 3},
        {"pin": "a", "why": 1},
        {"pin": ""},
        {"pin": 3},
        {"pin": "x" * 300},
        {"pin": "a", "unpin": "b"},
        {"pun": "a"},
        {"unpin": "none"},
        {"renew": "none"},
        {"pin": "a", "tokens": 0},
        {"pin": "a", "tokens": True},
        {"pin": "a", "ttl_s": "x"},
        {"pin": "a", "ttl_s": float("nan")},
        {"pin": "a", "worth": -1},
    ],
)
def test_bad_directives_are_told_and_change_nothing(directive: Any) -> None:
    s = make()
    r = Request("r", 8, 1, (1, 2), directive=directive)
    s.add(r, 0.0)
    drain(s)
    assert r.pin_reply is not None
    assert r.pin_reply["error"]
    assert s.pins.names() == ()
    assert s.pool.free == s.pool.capacity


def test_pin_names_are_bounded() -> None:
    s = make()
    pinned(s, "a", 8, {"pin": "a"})
    blocks = s.pool.lookup(request("q", 9, prefix=8, family="a").hashes, 2)
    for i in range(1030):
        s.pins.apply({"pin": str(i)}, blocks, 8, SIZE, 0.0)
    assert len(s.pins) == 1024
    assert s.pins.blocks == 2
