"""A worker's speed, recovered from the calls it finishes."""

from __future__ import annotations

import random

import pytest

from helium_proxy.dispatch.rates import PRIOR_PREFILL_S, Rates


def run(rates: Rates, prefill_s: float, decode_s: float, calls: int, seed: int = 1) -> None:
    """Calls one after the other on an engine with these costs."""
    random_ = random.Random(seed)
    now = 0.0
    for _ in range(calls):
        prompt, output = random_.randint(100, 4000), random_.randint(5, 400)
        rates.started("c", prompt, output, now)
        now += prompt * prefill_s + output * decode_s
        rates.finished("c", prompt, output, now)


@pytest.mark.parametrize("prefill", [1 / 2600, 1 / 20_000, 1 / 500])
@pytest.mark.parametrize("weight", [2, 4, 12])
def test_the_work_of_the_usual_mix_is_measured(prefill: float, weight: float) -> None:
    """Whatever a decoded token costs beside a prefilled one, calls like those seen are costed right."""
    rates = Rates()
    run(rates, prefill, weight * prefill, 300)
    assert rates.seconds(2050, 202) == pytest.approx(2050 * prefill + 202 * weight * prefill, rel=0.15)


def test_what_a_prefilled_token_costs_the_batch_is_told_apart_from_the_steps() -> None:
    """Eight calls at a time; steps of 10 ms, and a stall of 30 us for every token prefilled for any of them."""
    rates, random_ = Rates(), random.Random(5)
    ends: list[tuple[float, str, int]] = []
    now = 0.0
    for i in range(400):
        if len(ends) == 8:
            now, name, prompt = ends.pop(0)
            rates.finished(name, prompt, 64, now)
        prompt = random_.choice([50, 200, 1500])
        rates.started(f"c{i}", prompt, 64, now)
        ends = [(end + prompt * 30e-6, name, tokens) for end, name, tokens in ends]
        ends.append((now + prompt * 30e-6 + 64 * 10e-3, f"c{i}", prompt))
        ends.sort()
    assert rates.stall_s == pytest.approx(30e-6, rel=0.3)
    assert rates.bare_step_s == pytest.approx(10e-3, rel=0.15)
    assert rates.prefill_s > 3 * rates.stall_s, "whose decoding counts as four tokens' work each"


def _in_waves(rates: Rates, prefill_s: float, step_s: float, *, waves: int = 20) -> None:
    """Eight equal calls at a time, which begin and end together."""
    now = 0.0
    for wave in range(waves):
        for i in range(8):
            rates.started(f"{wave}/{i}", 600, 32, now)
        now += 8 * 600 * prefill_s + 32 * step_s
        for i in range(8):
            rates.finished(f"{wave}/{i}", 600, 32, now)


@pytest.mark.parametrize(("prefill_s", "step_s"), [(0.55e-3, 15e-3), (30e-6, 8e-3)])
def test_a_worker_that_was_timed_alone_is_known_though_all_calls_are_alike(prefill_s: float, step_s: float) -> None:
    """Both costs of a CPU engine and of an accelerator give the same seconds a call in some batch or other."""
    rates = Rates()
    rates.calibrated(prefill_s, step_s)
    assert rates.seconds(1000, 0) == pytest.approx(1000 * prefill_s)
    _in_waves(rates, prefill_s, step_s)
    assert rates.stall_s == pytest.approx(prefill_s, rel=0.1)
    assert rates.bare_step_s == pytest.approx(step_s, rel=0.1)


def test_a_prompt_that_waits_behind_others_is_not_taken_for_slow_steps() -> None:
    """Calls that begin one after the other, each behind the prompts of those before it."""
    rates, now = Rates(), 0.0
    rates.calibrated(0.5e-3, 10e-3)
    ends: list[tuple[float, str]] = []
    frontier = 0.0
    for i in range(200):
        if len(ends) == 8:
            now, name = ends.pop(0)
            rates.finished(name, 600, 32, now)
        rates.started(f"c{i}", 600, 32, now)
        frontier = max(frontier, now) + 600 * 0.5e-3
        ends = [(end + 600 * 0.5e-3, name) for end, name in ends]
        ends.append((frontier + 32 * 10e-3, f"c{i}"))
        ends.sort()
    assert rates.bare_step_s < 2 * 10e-3


def test_before_anything_is_measured_the_prior_holds() -> None:
    rates = Rates()
    assert rates.seconds(8000, 0) == pytest.approx(8000 * PRIOR_PREFILL_S)
    assert rates.statistics().windows == 0


def test_a_change_of_speed_is_followed() -> None:
    rates = Rates()
    run(rates, 1 / 1000, 1 / 100, 200)
    run(rates, 1 / 4000, 1 / 400, 400)
    assert rates.seconds(2050, 202) == pytest.approx(2050 / 4000 + 202 / 400, rel=0.15)


def test_costs_are_always_positive_and_abandoned_calls_do_no_harm() -> None:
    rates = Rates()
    random_ = random.Random(3)
    now = 0.0
    for _ in range(500):
        rates.started("c", 1000, 10, now)
        now += random_.random()
        if random_.random() < 0.3:
            rates.abandoned("c", now)
        else:
            rates.finished("c", random_.randint(0, 3000), random_.randint(0, 50), now)
        assert rates.seconds(1, 0) > 0
        assert rates.seconds(0, 1) > 0
    rates.finished("c", 10, 10, now)
    rates.abandoned("unheard of", now)
    assert rates.seconds(100, 10) > 0, "more ends than starts are survived"


def test_a_batch_is_measured_whole_when_its_first_call_ends() -> None:
    """Ten calls of 1,000 tokens that end together after ten seconds, but whose answers come one by one."""
    rates, seen = Rates(), []
    for i in range(10):
        rates.started(f"c{i}", 1000, 0, 0.0)
    for i in range(10):
        rates.finished(f"c{i}", 1000, 0, 10.0 + 0.1 * i)
        seen.append(rates.seconds(1000, 0))
    assert seen == pytest.approx([1.0] * 10, rel=0.15)


def test_one_that_has_just_begun_counts_for_little() -> None:
    rates = Rates()
    rates.started("long", 1000, 0, 0.0)
    rates.started("late", 1000, 0, 0.9)
    assert rates.finished("long", 1000, 0, 1.0)
    assert rates.seconds(1000, 0) == pytest.approx(1 / 1.1)


def test_a_worker_of_which_little_is_known_is_taken_to_be_like_its_peers() -> None:
    fresh, known = Rates(), Rates()
    fresh.believe(1 / 500)
    assert fresh.seconds(500, 0) == pytest.approx(1)
    run(known, 1 / 2000, 4 / 2000, 300)
    known.believe(1 / 500)
    assert known.seconds(2000, 0) == pytest.approx(1, rel=0.25)
