"""The circuit breaker, on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helium_proxy.workers.breaker import Breaker


def breaker() -> Breaker:
    return Breaker(failures=5, window_s=10.0, cooldown_s=1.0)


def opened(at: float = 0.0) -> Breaker:
    made = breaker()
    for _ in range(5):
        made.record(False, at)
    assert made.state(at) == "open"
    return made


def test_it_opens_on_many_failures_that_are_the_larger_part() -> None:
    made = breaker()
    assert [made.record(False, 0.1 * i) for i in range(5)] == [False] * 4 + [True]
    assert made.state(0.5) == "open"
    assert not made.allows(0.5)


def test_a_few_failures_among_many_successes_open_nothing() -> None:
    made = breaker()
    for i in range(200):
        made.record(i % 4 != 0, i * 0.01)
    assert made.state(2.0) == "closed"


def test_failures_older_than_the_window_do_not_count() -> None:
    made = breaker()
    for i in range(20):
        assert not made.record(False, i * 3.0)
    assert made.state(60.0) == "closed"


def test_one_probe_a_cool_down_and_its_success_closes() -> None:
    made = opened()
    assert made.state(0.99) == "open"
    assert made.state(1.0) == "half-open"
    assert made.allows(1.0)
    made.sent(1.0)
    assert not made.allows(1.5)
    made.record(True, 1.6)
    assert made.state(1.6) == "closed"
    assert not made.record(False, 1.7), "it begins anew"


def test_a_probe_that_fails_waits_longer_each_time_up_to_eight_fold() -> None:
    made, now, waits = opened(), 0.0, []
    for _ in range(6):
        start = now
        while made.state(now) != "half-open":
            now += 0.25
        waits.append(now - start)
        made.sent(now)
        assert made.record(False, now), "it has opened again"
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_probe_without_a_result_is_followed_by_another() -> None:
    made = opened()
    made.sent(1.0)
    assert not made.allows(1.9)
    assert made.allows(2.0)


def test_results_of_calls_sent_before_it_opened_do_not_close_it() -> None:
    made = opened()
    made.record(True, 0.5)
    assert made.state(0.5) == "open"
    made.record(False, 0.6)
    assert made.state(1.0) == "half-open", "nor do they put it off"


def test_reset() -> None:
    made = opened()
    made.reset()
    assert made.state(0.0) == "closed"
    assert "opened_at=None" in repr(made)


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200))
def test_it_is_never_shut_for_good(events: list[tuple[float, bool]]) -> None:
    """Whatever happened, within eight cool-downs a call may be sent, and one success then closes it."""
    made, now = breaker(), 0.0
    for pause, ok in events:
        now += pause
        if made.allows(now):
            made.sent(now)
            made.record(ok, now)
    now += 8.0
    assert made.allows(now)
    made.sent(now)
    made.record(True, now)
    assert made.state(now) == "closed"
