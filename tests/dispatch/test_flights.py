"""How many runs may be in flight on a worker, so that they find what they come back to."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from helium_proxy.dispatch import flights
from helium_proxy.dispatch.flights import Flights
from helium_proxy.dispatch.policy import decide
from helium_proxy.dispatch.state import DispatchState, QueuedCall

from .fleets import ask, blocks, call, fleet

GROUP = "t", "demo", "debate"


def begin(known: Flights, run: int, written: int = 5, worker: str = "w0") -> None:
    known.arrived((run, None), GROUP, 0.0)
    known.started((run, None), worker, (run,), 0, written)


def whole(known: Flights, run: int, written: int, *, back: bool, found: bool = True) -> None:
    """A run of two calls; in the second it comes back to what the first has written, and may find it."""
    begin(known, run, written)
    known.left((run, None), 1.0)
    known.arrived((run, None), GROUP, 1.01)
    known.started((run, None), "w0", (run, -run) if back else (-run,), int(found), 2)
    known.left((run, None), 2.0, last=True)


def how_many(known: Flights, written: int, capacity: int) -> int:
    """Further runs, each of whose first calls writes so much, that may begin."""
    for run in range(1000, 1100):
        known.arrived((run, None), GROUP, 0.0)
        if not known.fits(GROUP, "w0", written, capacity):
            return run - 1000
        known.started((run, None), "w0", (run,), 0, written)
    return 100


def test_of_an_unknown_workflow_a_run_is_taken_to_grow() -> None:
    known = Flights()
    begin(known, 1, written=13)  # eight of them shared with the runs that follow
    assert how_many(known, 5, 100) == 3, "(13 + 15) + 3 * (5 + 15)"


def test_what_runs_write_is_learned_from_those_that_ended() -> None:
    known = Flights()
    for run in range(1, 9):
        whole(known, run, 6, back=True)
    assert known.habits(GROUP).written == pytest.approx(8)
    assert how_many(known, 6, 80) == 10


def test_how_often_calls_come_back_is_learned() -> None:
    for back in (True, False):
        known = Flights()
        for run in range(1, 9):
            whole(known, run, 6, back=back)
        assert known.habits(GROUP).came_back == (0.5 if back else 0), "the second of two calls"


def test_what_is_lost_is_learned_from_what_comes_back_to_the_same_worker() -> None:
    def back(known: Flights, worker: str, resident: int) -> float:
        for run in range(1, 201):
            known.arrived((run, None), GROUP, 0.0)
            known.started((run, None), "w0", (run, -run), 0, 2)
            known.arrived((run, None), GROUP, 1.0)
            known.started((run, None), worker, (run, -run, 7), resident, 2)
        return known.habits(GROUP).lost

    assert back(Flights(), "w0", 2) < 0.02
    assert back(Flights(), "w1", 0) == 1.0, "it was moved: nothing says what it would have found"
    known = Flights()
    assert back(known, "w0", 2) < 0.02
    assert back(known, "w0", 1) > 0.95, "a part of it is not enough"


def test_a_run_in_flight_goes_on_and_every_workflow_may_have_one() -> None:
    known = Flights()
    begin(known, 1, written=90)
    begin(known, 2, written=90, worker="w1")
    assert known.has_begun((1, None), "w0")
    assert not known.has_begun((2, None), "w0")
    assert not known.fits(GROUP, "w0", 50, 100)
    assert known.fits(("t", "demo", "other"), "w0", 50, 100)
    assert known.has_begun((0, None), "w0"), "a call of no run"


def test_a_run_whose_next_call_does_not_come_has_ended() -> None:
    known = Flights()
    begin(known, 1, written=90)
    known.left((1, None), 10.0)
    end = known.next_end()
    assert end is not None
    assert end > 10.0
    known.expire(end - 0.001)
    assert known.committed("w0") == 90
    known.expire(end)
    assert known.committed("w0") == 0, "it pauses"
    judged = known.next_end()
    assert judged is not None
    assert known.habits(GROUP).ended == 0
    known.expire(judged)
    assert known.habits(GROUP).ended == 1
    assert known.next_end() is None


def test_a_run_that_pauses_for_longer_than_others_has_not_ended() -> None:
    known = Flights()
    begin(known, 1, written=90)
    known.left((1, None), 10.0)
    known.arrived((1, None), GROUP, 11.0)
    habits = known.habits(GROUP)
    assert habits.ended == 0
    assert habits.pause.mean_s > 0.15, "that was a pause of a second"
    assert known.has_begun((1, None), "w0"), "it comes back to what it wrote"
    known.started((1, None), "w0", (1, 2), 1, 5)
    assert known.committed("w0") == 95
    known.left((1, None), 12.0, last=True)
    known.arrived((1, None), GROUP, 15.0)
    assert habits.pause.mean_s > 0.4, "also where it had been taken to have ended"


def test_a_run_that_is_given_up_teaches_nothing() -> None:
    known = Flights()
    begin(known, 1, written=90)
    known.withdrawn((1, None))
    assert known.committed("w0") == 0
    assert known.habits(GROUP).ended == 0


def test_an_equal_prompt_is_a_retry_and_nothing_that_comes_back() -> None:
    known = Flights()
    for _ in range(2):
        known.arrived((1, None), GROUP, 0.0)
        known.started((1, None), "w0", (1, 2, 3), 0, 5)
    for _ in range(2):
        known.left((1, None), 1.0, last=True)
    assert known.habits(GROUP).came_back == 0


def test_how_long_is_waited_follows_the_pauses() -> None:
    known = Flights()
    for turn in range(100):
        known.arrived((1, None), GROUP, 10.0 * turn + 3.0)
        known.left((1, None), 10.0 * turn + 10.0)
    assert known.habits(GROUP).patience_s == pytest.approx(3.0, rel=0.05)


def test_a_worker_that_is_lost_has_no_runs() -> None:
    known = Flights()
    begin(known, 1, written=90)
    known.gone("w0")
    assert known.committed("w0") == 0
    known.left((1, None), 1.0, last=True)


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "_RUNS", 10)
    monkeypatch.setattr(flights, "_GROUPS", 5)
    known = Flights()
    for run in range(1, 100):
        begin(known, run)
        known.habits(("t", "demo", str(run)))
    assert len(known._runs) == 10
    assert len(known._habits) <= 5
    assert known.committed("w0") <= 10 * 20


def test_sums_by_worker_are_of_the_runs_in_flight_there() -> None:
    """Whatever order they begin, go on, pause, end and are lost in."""
    rng = random.Random(1)
    known = Flights()
    for step in range(3000):
        now, run, worker = 0.01 * step, (rng.randrange(1, 40), None), rng.choice(("w0", "w1"))
        group = ("t", "demo", f"g{run[0] % 3}")
        action = rng.random()
        if action < 0.6:
            known.arrived(run, group, now)
            known.started(run, worker, (run[0], step), rng.randrange(2), rng.randrange(1, 30))
        elif action < 0.98:
            known.left(run, now, last=rng.random() < 0.3)
        elif action < 0.99:
            known.withdrawn(run)
        else:
            known.gone(worker)
        known.expire(now)
        for name, here in known._here.items():
            flights_here = [f for f in known._runs.values() if name in f.written and f in here.runs.values()]
            assert len(flights_here) == len(here.runs)
            assert here.groups == Counter(f.group for f in flights_here)
            wanted = [max(f.written[name].total, f.habits.working_set(f.written[name].first)) for f in flights_here]
            assert known.committed(name) == pytest.approx(sum(wanted), rel=0.25), "as known lately"


# -- in decisions


def _worker(prefill_token_s: float, **options: bool) -> DispatchState:
    """Of 100 blocks, timed: steps of 10 ms."""
    state = fleet(1, capacity=100, **options)
    state.workers["w0"].rates.calibrated(prefill_token_s, 0.010)
    return state


def _started(state: DispatchState) -> int:
    firsts = [call(blocks(f"run {i}", 4), output=16, run_seq=i + 1, group="debate") for i in range(12)]
    return len(ask(state, *firsts))


def test_where_prefill_is_slow_no_more_runs_begin_than_can_come_back() -> None:
    assert _started(_worker(1e-3)) == 4, "each writes six blocks now, and is taken to write 24"
    assert _started(_worker(1e-5)) == 12, "where it is fast, the batch counts"
    assert _started(_worker(1e-3, working_sets=False)) == 12


def test_runs_in_flight_go_before_those_that_wait_and_these_follow() -> None:
    state = _worker(1e-3)
    begun = ask(state, *(call(blocks(f"run {i}", 4), output=16, run_seq=i + 1, group="debate") for i in range(12)))
    assert state.release("w0", begun[0].call.id, 1.0)
    assert decide(state, 1.0) == [], "its next call may come"
    longer = blocks("and on", 2, begun[0].call.chain)
    (back,) = ask(state, call(longer, output=16, run_seq=1, group="debate"), now=1.1)
    assert back.cached_tokens == 4 * 16
    assert state.release("w0", back.call.id, 2.0)
    end = state.flights.next_end()
    assert end is not None
    assert [a.call.hints.run_seq for a in decide(state, end)] == [5], "it has ended, and another one begins"


def test_runs_that_never_come_back_are_not_limited() -> None:
    state = _worker(1e-3)
    for run in range(1000, 1008):
        whole(state.flights, run, 6, back=False)
    assert _started(state) == 12


def test_while_what_comes_back_is_found_more_begin() -> None:
    for found, started in ((True, 12), (False, 4)):
        state = _worker(1e-3)
        for run in range(1000, 1200):
            whole(state.flights, run, 20, back=True, found=found)
        assert _started(state) == started


def _first(run: int, **fields: Any) -> QueuedCall:
    return call(blocks(f"run {run}", 4), output=16, run_seq=run, **{"group": "debate", **fields})


def _next_of(begun: QueuedCall, **fields: Any) -> QueuedCall:
    run = begun.hints.run_seq
    return call(blocks("and on", 2, begun.chain), output=16, run_seq=run, **{"group": "debate", **fields})


def test_what_may_go_is_found_behind_many_that_may_not() -> None:
    state = _worker(1e-3)
    begun = ask(state, *(_first(i + 1) for i in range(100)))
    assert state.release("w0", begun[0].call.id, 1.0)
    late = _next_of(begun[0].call)
    state.enqueue(late, 1.1)
    queue = state.queues["demo"]
    assert queue.remove(late)
    late.rank = (0, 1e9, 1, 0.0, 10**6)
    queue.push(late)
    (back,) = decide(state, 1.1)
    assert back.call is late


def test_whose_turn_it_is_does_not_stop_others_while_it_may_not_begin() -> None:
    """Its runs wait for those in flight, and these are another workflow's."""
    state = _worker(1e-3)
    begun = ask(state, *(_first(i + 1, group="a") for i in range(12)))
    assert state.release("w0", begun[0].call.id, 1.0)
    (other,) = ask(state, _first(50, group="b"), now=1.0)
    assert ask(state, *(_first(51 + i, group="b") for i in range(8)), now=1.0) == []
    assert state.release("w0", other.call.id, 2.0)
    (back,) = ask(state, _next_of(begun[0].call, group="a"), now=2.0)
    assert back.call.hints.run_seq == 1


def test_urgent_runs_that_may_not_begin_let_others_go_on_and_a_deadline_does_not_wait() -> None:
    state = _worker(1e-3)
    begun = ask(state, *(_first(i + 1, priority=1) for i in range(12)))
    assert ask(state, *(_first(50 + i, priority=-1) for i in range(3))) == []
    assert state.release("w0", begun[0].call.id, 1.0)
    (back,) = ask(state, _next_of(begun[0].call, priority=1), now=1.1)
    assert back.call.hints.run_seq == 1
    (hurried,) = ask(state, _first(60, deadline_s=1.0, priority=1), now=1.2)
    assert hurried.call.hints.run_seq == 60


def test_calls_on_a_worker_that_leaves_are_over() -> None:
    state = fleet(2, capacity=100)
    for worker in state.workers.values():
        worker.rates.calibrated(1e-3, 0.010)
    begun = ask(state, *(_first(i + 1) for i in range(12)))
    assert {a.worker for a in begun} == {"w0", "w1"}
    state.leave("w0")
    for assignment in begun:
        state.release(assignment.worker, assignment.call.id, 1.0)
    state.expire(100.0)
    state.expire(200.0)
    waiting = {c.flight for queue in state.queues.values() for c in queue}
    assert set(state.flights._runs) == waiting


def test_nothing_is_noted_where_it_is_turned_off() -> None:
    state = _worker(1e-3, working_sets=False)
    assert _started(state) == 12
    assert not state.flights._runs


def test_a_small_call_of_another_workflow_is_not_held() -> None:
    state = _worker(1e-3)
    assert _started(state) == 4
    assert len(ask(state, call(blocks("alone", 4), output=16, run_seq=99, group="zchat"))) == 1
