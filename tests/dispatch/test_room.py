"""The KV that running calls will hold at the most, against a simulation step by step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helium_proxy.dispatch.room import KvForecast


def test_calls_at_different_places_need_less_than_the_sum() -> None:
    forecast = KvForecast()
    for i in range(10):
        forecast.add(f"c{i}", end=float(i), blocks=10.0)
    peak = forecast.peak(now=0.0, growth=1.0, blocks=10.0, end=10.0)
    assert forecast.reserved == 100.0
    assert 50 < peak < 70, "about half of what all hold at their ends"


def test_calls_that_end_together_need_the_sum() -> None:
    forecast = KvForecast()
    for i in range(9):
        forecast.add(f"c{i}", end=10.0, blocks=10.0)
    assert forecast.peak(now=0.0, growth=1.0, blocks=10.0, end=10.0) == 100.0


def test_a_call_that_is_overdue_holds_all_its_blocks() -> None:
    forecast = KvForecast()
    forecast.add("late", end=1.0, blocks=10.0)
    assert forecast.peak(now=50.0, growth=0.1, blocks=4.0, end=60.0) >= 10.0


def test_what_is_removed_counts_no_more() -> None:
    forecast = KvForecast()
    forecast.add("a", 5.0, 3.0)
    forecast.add("b", 5.0, 4.0)
    forecast.remove("a")
    forecast.remove("a")
    forecast.remove("never")
    assert forecast.reserved == 4.0
    assert forecast.peak(5.0, 1.0, 0.0, 5.0) == 4.0


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=12),
    st.tuples(st.integers(0, 40), st.integers(0, 12)),
)
def test_the_peak_is_that_of_a_simulation(calls: list[tuple[int, int]], new: tuple[int, int]) -> None:
    """One block a second; each call holds `blocks` at its end and nothing after it."""
    forecast = KvForecast()
    for index, (end, blocks) in enumerate(calls):
        forecast.add(f"c{index}", float(end), float(blocks))
    peak = forecast.peak(0.0, 1.0, float(new[1]), float(new[0]))
    moments = [
        sum(blocks - (end - moment) for end, blocks in [*calls, new] if end >= moment)
        for moment in {end for end, _ in [*calls, new]}
    ]
    assert peak == max([0, *moments])
