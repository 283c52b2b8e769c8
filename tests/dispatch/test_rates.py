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
        rates.started(now)
        took = prompt * prefill_s + output * decode_s
        now += took
        rates.finished(prompt, output, took, now)


@pytest.mark.parametrize("prefill", [1 / 2600, 1 / 20_000, 1 / 500])
@pytest.mark.parametrize("weight", [2, 4, 12])
def test_the_work_of_the_usual_mix_is_measured(prefill: float, weight: float) -> None:
    """Whatever a decoded token costs beside a prefilled one, calls like those seen are costed right."""
    rates = Rates()
    run(rates, prefill, weight * prefill, 300)
    assert rates.work(2050, 202) == pytest.approx(2050 * prefill + 202 * weight * prefill, rel=0.15)


def test_before_anything_is_measured_the_prior_holds() -> None:
    rates = Rates()
    assert rates.work(8000, 0) == pytest.approx(8000 * PRIOR_PREFILL_S)
    assert rates.statistics().windows == 0


def test_a_change_of_speed_is_followed() -> None:
    rates = Rates()
    run(rates, 1 / 1000, 1 / 100, 200)
    run(rates, 1 / 4000, 1 / 400, 400)
    assert rates.work(2050, 202) == pytest.approx(2050 / 4000 + 202 / 400, rel=0.15)


def test_costs_are_always_positive_and_abandoned_calls_do_no_harm() -> None:
    rates = Rates()
    random_ = random.Random(3)
    now = 0.0
    for _ in range(500):
        rates.started(now)
        now += random_.random()
        if random_.random() < 0.3:
            rates.abandoned(now)
        else:
            rates.finished(random_.randint(0, 3000), random_.randint(0, 50), random_.random(), now)
        assert rates.work(1, 0) > 0
        assert rates.work(0, 1) > 0
    rates.finished(10, 10, 1.0, now)
    rates.abandoned(now)
    assert rates.work(100, 10) > 0, "more ends than starts are survived"
