"""Which waiting call goes next."""

from __future__ import annotations

from .fleets import SIZE, ask, blocks, call, finish, fleet, in_turn, one_by_one


def test_a_client_s_priority_goes_before_everything() -> None:
    state = one_by_one()
    calls = [call(priority=p, tenant=t) for p, t in ((3, "a"), (0, "b"), (-7, "a"), (0, "a"), (5, "b"))]
    for one in calls:
        state.enqueue(one, 0.0)
    assert [c.hints.priority for c in in_turn(state)] == [-7, 0, 0, 3, 5]


def test_older_runs_first_and_in_a_run_the_longest_remaining_path() -> None:
    state = one_by_one()
    old_short, new = call(run_seq=1, path_output_tokens=10), call(run_seq=2, path_output_tokens=5000)
    old_long = call(run_seq=1, path_output_tokens=900)
    for now, one in enumerate((old_short, new, old_long)):
        state.enqueue(one, float(now))
    assert in_turn(state) == [old_long, old_short, new]


def test_runs_under_way_go_before_one_that_finds_more_of_its_prompt_cached() -> None:
    state, role = one_by_one(), blocks("role", 10)
    (first,) = ask(state, call(role, run_seq=9))
    begun, new = call(blocks("other role", 10), run_seq=9), call(blocks("q", 15, role), run_seq=1)
    assert not ask(state, new, begun)
    finish(state, first)
    assert in_turn(state) == [begun, new]


def test_of_new_runs_that_goes_first_whose_prompt_is_cached() -> None:
    state, prefix = one_by_one(), blocks("p", 50)
    (first,) = ask(state, call(prefix, run_seq=1))
    cold, warm = call(blocks("q", 50), run_seq=2, path_output_tokens=100), call(prefix, run_seq=3)
    assert not ask(state, cold, warm)
    finish(state, first)
    assert in_turn(state) == [warm, cold]


def test_fifo_is_by_arrival() -> None:
    state = one_by_one(ordering="fifo")
    calls = [call(run_seq=5 - i, path_output_tokens=100 * i) for i in range(5)]
    for now, one in enumerate(calls):
        state.enqueue(one, float(now))
    assert in_turn(state) == calls


def test_a_call_that_must_start_soon_to_be_in_time_goes_first() -> None:
    state = one_by_one()
    plain, relaxed = call(arrived_at=100.0), call(deadline_s=1000.0, arrived_at=100.0)
    urgent = call(output=10_000, deadline_s=10.0, arrived_at=100.0)
    for one in (plain, relaxed, urgent):
        state.enqueue(one, 100.0)
    assert in_turn(state) == [urgent, plain, relaxed]


def test_equal_tenants_get_equal_shares() -> None:
    state = one_by_one()
    for i in range(60):
        state.enqueue(call(tenant="large", run_seq=1), float(i))
    for i in range(10):
        state.enqueue(call(tenant="small", run_seq=2), 60.0 + i)
    order = [c.tenant for c in in_turn(state)]
    assert order[:22].count("small") == 10, "a tenant waits for its own calls, not for another's"


def test_a_tenant_saves_up_no_credit() -> None:
    state = one_by_one()
    for _ in range(50):
        state.enqueue(call(tenant="a"), 0.0)
    in_turn(state)
    for i in range(20):
        state.enqueue(call(tenant="ab"[i % 2]), 1.0)
    order = [c.tenant for c in in_turn(state)]
    assert 4 <= order[:10].count("a") <= 6


def test_a_small_run_waits_at_most_twice_as_long_as_in_fifo_order() -> None:
    """A call that arrives behind a large workflow: its place with the policy against its place by arrival."""
    for behind in (1, 10, 100, 400):
        places = {}
        for ordering in ("run", "fifo"):
            state = one_by_one(ordering=ordering, window=1000)
            for i in range(behind):
                state.enqueue(call(run_seq=1, path_output_tokens=100.0, group="large"), i * 0.01)
            small = call(run_seq=2, group="small")
            state.enqueue(small, behind * 0.01)
            for i in range(400):  # the large one goes on and on
                state.enqueue(call(run_seq=1, path_output_tokens=900.0, group="large"), behind * 0.01 + i)
            places[ordering] = in_turn(state).index(small) + 1
        assert places["run"] <= 2 * places["fifo"], behind


def test_the_rank_fits_the_engine_s_integer() -> None:
    state = fleet(1)
    for priority in (-(2**31), 2**31 - 1, 0):
        (assignment,) = ask(state, call(priority=priority), now=1e6)
        assert -(2**31) < assignment.engine_priority < 2**31


def test_a_prompt_of_full_blocks_recomputes_its_last() -> None:
    state = fleet(1)
    whole = blocks("p", 4)
    (first,) = ask(state, call(whole, prompt_tokens=4 * SIZE))
    finish(state, first)
    (again,) = ask(state, call(whole, prompt_tokens=4 * SIZE))
    assert again.cached_tokens == 3 * SIZE
