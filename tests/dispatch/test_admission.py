"""Whether a call runs now or waits for room."""

from __future__ import annotations

from typing import Any

from helium_proxy.dispatch.policy import decide
from helium_proxy.dispatch.state import DispatchState

from .fleets import ask, blocks, call, finish, fleet


def test_what_finds_no_room_waits_for_it() -> None:
    state = fleet(1, capacity=100, kv_share=0.5)
    (first,) = ask(state, call(blocks("a", 40)), call(blocks("b", 40)))
    assert state.queued == 1
    assert decide(state, 1.0) == []
    finish(state, first)
    (second,) = decide(state, 2.0)
    assert second.call.chain == blocks("b", 40)


def test_a_call_larger_than_the_share_runs_alone_rather_than_never() -> None:
    state = fleet(1, capacity=100, kv_share=0.5)
    (first,) = ask(state, call(blocks("huge", 90)))
    assert ask(state, call(blocks("small", 1))) == []
    finish(state, first)
    assert len(decide(state, 1.0)) == 1


def test_shared_blocks_count_once() -> None:
    prefix = blocks("p", 40)
    state = fleet(1, capacity=100, kv_share=0.6)
    assignments = ask(state, *(call(blocks(f"q{i}", 1, prefix), output=8) for i in range(6)))
    assert len(assignments) == 6


def test_pinned_blocks_that_running_calls_hold_count_once() -> None:
    prefix = blocks("p", 40)
    state = fleet(1, capacity=100)
    state.workers["w0"].residency.pin("p", prefix)
    assignments = ask(state, *(call(blocks(f"q{i}", 1, prefix), output=8) for i in range(12)))
    assert len(assignments) == 12


def test_pinned_blocks_that_nobody_runs_on_are_left_alone() -> None:
    state = fleet(1, capacity=100)
    state.workers["w0"].residency.pin("p", blocks("p", 40))
    assert len(ask(state, *(call(blocks(f"q{i}", 25), output=8) for i in range(4)))) == 2


def _with_measured_rates(stall_s: float, **options: Any) -> DispatchState:
    """A worker of 100 blocks where a step takes 10 ms, and each prefilled token `stall_s`."""
    state = fleet(1, capacity=100, kv_share=0.9, overcommit=0.3, **options)
    rates = state.workers["w0"].rates
    rates.stall_s, rates.bare_step_s, rates.step_s = stall_s, 0.010, 0.010
    return state


def test_where_prefill_is_fast_more_run_than_the_kv_holds_at_their_peak() -> None:
    calls = [blocks(f"q{i}", 20) for i in range(8)]
    assert len(ask(_with_measured_rates(1e-3), *(call(c, output=64) for c in calls))) == 3
    assert len(ask(_with_measured_rates(1e-5), *(call(c, output=64) for c in calls))) == 4
    assert len(ask(_with_measured_rates(1e-5), *(call(c, output=1) for c in calls))) == 4, "not for a token"


def test_smaller_calls_go_while_the_next_finds_no_room_where_that_costs_little() -> None:
    def started(stall_s: float) -> list[str]:
        state = _with_measured_rates(stall_s, window=8)
        assert len(ask(state, call(blocks("runs", 60), output=64))) == 1
        large = call(blocks("large", 60), output=64)
        small = [call(blocks(f"small-{i}", 4), output=64) for i in range(3)]
        return [a.call.id for a in ask(state, large, *small)]

    assert started(1e-3) == [], "each of them could push out what the large one would find cached"
    assert len(started(1e-5)) == 3


def test_a_call_without_room_is_overtaken_only_so_often() -> None:
    state = _with_measured_rates(1e-5)
    (runs,) = ask(state, call(blocks("runs", 60), output=64))
    large = call(blocks("large", 60), output=64)
    assert ask(state, large) == []
    for i in range(16):
        (small,) = ask(state, call(blocks(f"small-{i}", 4), output=64))
        finish(state, small)
    assert ask(state, call(blocks("one too many", 4), output=64)) == []
    finish(state, runs)
    assert decide(state, 1.0)[0].call is large


def test_pins_are_not_overcommitted() -> None:
    state = _with_measured_rates(1e-5)
    state.workers["w0"].residency.pin("p", blocks("p", 20))
    assert len(ask(state, *(call(blocks(f"q{i}", 20), output=64) for i in range(8)))) == 3


def test_without_admission_everything_goes_at_once() -> None:
    state = fleet(2, capacity=10, admission=False)
    assert len(ask(state, *(call(blocks(f"a{i}", 8)) for i in range(30)))) == 30


def test_an_idle_worker_is_used_though_the_prefix_is_elsewhere() -> None:
    state = fleet(2, capacity=100, kv_share=0.5)
    prefix = blocks("p", 30)
    first = ask(state, call(prefix, output=200))
    second = ask(state, call(blocks("q", 1, prefix), output=600))
    assert len(first) == len(second) == 1
    assert {first[0].worker, second[0].worker} == {"w0", "w1"}
