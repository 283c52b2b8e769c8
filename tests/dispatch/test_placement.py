"""Placing visits few workers; it must find what visiting all would."""

from __future__ import annotations

import random

import pytest

from helium_proxy.dispatch import placement
from helium_proxy.dispatch.placement import Sites, until_done
from helium_proxy.dispatch.queue import Queue
from helium_proxy.dispatch.state import DispatchState, QueuedCall

from .fleets import ask, blocks, call, finish, fleet


def counted(state: DispatchState, queue: Queue, one: QueuedCall) -> dict[str, float]:
    """Seconds that `one` counts for on each worker, by asking every one of them."""
    found = {}
    cached = {}
    for worker in state.workers.values():
        resident, held = worker.residency.matches(one.chain)
        ((shared, _),) = queue.shared(one.chain, worker.residency.bit)
        cached[worker.id] = max(resident, shared)
        cost = worker.cost(one, cached[worker.id], max(held, shared))
        found[worker.id] = until_done(queue, worker, 0.0) + placement._WASTE * cost * worker.rates.prefill_s
    if one.suggestion:
        found[one.suggestion] -= one.prompt_tokens * state.workers[one.suggestion].rates.prefill_s
    elif one.home:
        lost = cached[one.home] - max(n for name, n in cached.items() if name != one.home)
        tokens = max(0, lost) * one.block_size
        found[one.home] -= placement._MOVED * tokens * state.workers[one.home].rates.prefill_s
    return found


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_the_cheapest_of_all(seed: int) -> None:
    rng = random.Random(seed)
    state = fleet(6, 800)
    for worker in state.workers.values():
        worker.rates.prefill_s *= rng.uniform(0.5, 2)
        worker.rates.step_s *= rng.uniform(0.5, 2)
        if rng.random() < 0.2:
            worker.capacity = None
    roles = [blocks(f"role {index}", rng.choice([0, 5, 60])) for index in range(4)]
    texts = [blocks(f"text {index}", 10 + index, rng.choice(roles)) for index in range(12)]

    def some() -> QueuedCall:
        chain = blocks("question", rng.randint(0, 4), rng.choice(texts)[: rng.choice([3, 40, 90])])
        return call(chain, rng.choice([4, 64, 400]))

    for _ in range(3):
        for assignment in ask(state, *(some() for _ in range(12))):
            if rng.random() < 0.6:
                finish(state, assignment)
    queue = state.queues.setdefault("demo", Queue())
    sites = Sites(state, queue, list(state.workers.values()), 0.0)
    for turn in range(60):
        one = some()
        one.rank = (0, 0.0, 0, 0.0, 1000 + turn)
        if rng.random() < 0.3:
            one.suggestion = rng.choice(list(state.workers))
        elif rng.random() < 0.3:
            one.home = rng.choice(list(state.workers))
        queue.push(one)
        every = counted(state, queue, one)
        sites.place(one)
        assert one.lane is not None
        assert every[one.lane] == pytest.approx(min(every.values()))


def test_a_run_stays_where_it_has_run() -> None:
    state, prompt = fleet(2), blocks("run", 30)
    first, other = ask(state, call(prompt, group="flow"), call(blocks("other", 30)))
    assert {first.worker, other.worker} == {"w0", "w1"}
    finish(state, other)
    finish(state, first)
    busy = ask(state, *(call(blocks(f"new {index}", 30), output=64) for index in range(6)))
    assert {a.worker for a in busy} == {"w0", "w1"}
    for assignment in busy:
        if assignment.worker != first.worker:
            finish(state, assignment)
    (following,) = ask(state, call(blocks("more", 2, prompt), group="flow"))
    assert following.worker == first.worker, "though the other one is idle"
    assert following.call.home == first.worker


def test_a_prompt_that_others_hold_as_well_is_no_reason_to_stay() -> None:
    state, prompt = fleet(2), blocks("shared", 30)
    for worker in state.workers.values():
        worker.residency.store(prompt[::-1])
        worker.version += 1
    (first,) = ask(state, call(prompt))
    finish(state, first)
    busy = ask(state, *(call(blocks(f"new {index}", 30), output=640) for index in range(6)))
    for assignment in busy:
        if assignment.worker != first.worker:
            finish(state, assignment)
    (following,) = ask(state, call(blocks("more", 2, prompt)))
    assert following.worker != first.worker


def test_a_home_that_is_gone_is_no_home() -> None:
    state, prompt = fleet(2), blocks("run", 30)
    (first,) = ask(state, call(prompt))
    finish(state, first)
    state.leave(first.worker)
    (following,) = ask(state, call(blocks("more", 2, prompt)))
    assert following.worker != first.worker
