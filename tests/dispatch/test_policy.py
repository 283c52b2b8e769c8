"""Placement and take-over, decided without a network and without a clock."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helium_proxy.dispatch.policy import decide
from helium_proxy.dispatch.state import Assignment, QueuedCall

from .fleets import SIZE, ask, blocks, call, finish, fleet

# -- where


def test_a_call_goes_where_its_prefix_is() -> None:
    state = fleet(3)
    prefix = blocks("system", 50)
    (first,) = ask(state, call(prefix))
    finish(state, first)
    for i in range(5):
        (again,) = ask(state, call(blocks(f"q{i}", 2, prefix)))
        assert again.worker == first.worker
        assert again.reason == "prefix"
        assert again.cached_tokens == 50 * SIZE
        finish(state, again)


def test_look_alikes_do_not_land_on_one_worker() -> None:
    """`session-1` and `session-12` have nothing in common."""
    state = fleet(2)
    assignments = ask(state, *(call(blocks(f"session-{i}", 20)) for i in range(40)))
    assert Counter(a.worker for a in assignments) == {"w0": 20, "w1": 20}


def test_siblings_gather_while_that_pays() -> None:
    state = fleet(2)
    prefix = blocks("long document", 500)
    assignments = ask(state, *(call(blocks(f"q{i}", 1, prefix), output=4) for i in range(4)))
    assert len({a.worker for a in assignments}) == 1
    assert [a.cached_tokens for a in assignments] == [0, *[500 * SIZE] * 3], "shared while it is being prefilled"


def test_siblings_are_split_when_the_wait_would_cost_more_than_the_prefix() -> None:
    state = fleet(2)
    prefix = blocks("short prompt", 20)
    assignments = ask(state, *(call(blocks(f"q{i}", 1, prefix), output=400) for i in range(40)))
    counts = Counter(a.worker for a in assignments)
    assert sorted(counts.values())[0] >= 17
    computed = [a for a in assignments if a.cached_tokens == 0]
    assert len(computed) == 2, "the prefix is computed once on each"


def test_an_overloaded_worker_loses_its_calls_to_an_idle_one() -> None:
    state = fleet(2)
    prefix = blocks("p", 10)
    (first,) = ask(state, call(prefix))
    finish(state, first)
    busy = ask(state, *(call(blocks(f"q{i}", 1, prefix), output=2000) for i in range(20)))
    assert {a.worker for a in busy} == {"w0", "w1"}


def test_a_worker_whose_batch_is_about_done_is_not_taken_to_be_busy() -> None:
    """The answers of a batch come one after the other: a call whose prefix is there waits for it, though the other
    worker is idle."""
    state = fleet(2)
    batch = ask(state, *(call(blocks(f"run{i}", 100)) for i in range(20)))
    here = [a for a in batch if a.worker == batch[0].worker]
    whole = state.workers[batch[0].worker].backlog_s(0.0)
    for assignment in batch:
        if assignment.worker != batch[0].worker:
            finish(state, assignment)
    (early,) = ask(state, call(blocks("next", 1, here[0].call.chain)))
    assert early.worker != batch[0].worker
    (late,) = ask(state, call(blocks("next", 2, here[1].call.chain)), now=0.95 * whole)
    assert late.worker == batch[0].worker
    assert late.cached_tokens == 100 * SIZE


def test_only_workers_of_the_model_and_only_open_ones() -> None:
    state = fleet(3)
    state.workers["w0"].models = frozenset({"other"})
    state.workers["w1"].open = False
    assignments = ask(state, *(call(blocks(f"x{i}", 3)) for i in range(5)))
    assert {a.worker for a in assignments} == {"w2"}
    state.workers["w2"].open = False
    assert ask(state, call()) == []
    assert state.queued == 1


def test_a_worker_that_failed_a_call_is_not_given_it_again_unless_it_is_the_only_one() -> None:
    state = fleet(2)
    prefix = blocks("p", 100)
    (first,) = ask(state, call(prefix))
    finish(state, first)
    (again,) = ask(state, call(prefix, exclude=frozenset({first.worker})))
    assert again.worker != first.worker
    for worker in state.workers.values():
        worker.open = worker.id == first.worker
    (last,) = ask(state, call(prefix, exclude=frozenset({first.worker})))
    assert last.worker == first.worker


def test_the_ablations() -> None:
    prefix = blocks("p", 100)
    for placement, expected in (("round-robin", {"w0": 5, "w1": 5}), ("least-loaded", {"w0": 5, "w1": 5})):
        state = fleet(2, placement=placement)
        assignments = ask(state, *(call(prefix) for _ in range(10)))
        assert Counter(a.worker for a in assignments) == expected
        assert {a.reason for a in assignments} == {placement}


# -- side by side


def test_calls_that_share_a_prefix_run_side_by_side() -> None:
    """Two roles with long instructions, alternating in the queue; a worker that holds one and four questions."""
    state = fleet(1, capacity=60)
    roles = [blocks("pro", 40), blocks("contra", 40)]
    for i in range(12):
        state.enqueue(call(blocks(f"q{i}", 1, roles[i % 2]), output=16, run_seq=i + 1), 0.0)
    first = decide(state, 0.0)
    assert len(first) >= 4
    assert len({a.call.chain[:40] for a in first}) == 1, "both roles' instructions would fill the cache"


def test_who_shares_is_found_behind_the_window() -> None:
    """Its first calls all belong to a role of which nothing runs."""
    state = fleet(1, max_running=2, window=8)
    pro, contra = blocks("pro", 40), blocks("contra", 40)
    (runs,) = ask(state, call(blocks("q", 1, contra), run_seq=1, node="contra"))
    many = [call(blocks(f"q{i}", 1, pro), run_seq=2 + i, node="pro") for i in range(20)]
    shares = call(blocks("last", 1, contra), run_seq=99, node="contra")
    (next_one,) = ask(state, *many, shares)
    assert next_one.call is shares
    finish(state, runs)
    finish(state, next_one)
    assert [a.call for a in decide(state, 0.0)] == many[:2], "nothing runs: rank decides"


def test_a_call_of_another_role_is_not_passed_for_ever() -> None:
    state = fleet(1, capacity=60, max_running=2)
    many, other = blocks("many", 40), call(blocks("rare", 45), run_seq=2)
    running = ask(state, call(blocks("q", 1, many), run_seq=1))
    state.enqueue(other, 0.0)
    for i in range(2000):
        state.enqueue(call(blocks(f"q{i}", 1, many), run_seq=3 + i), 1.0 + i)
        running += decide(state, 1.0 + i)
        if running[-1].call is other:
            break
        finish(state, running.pop(0))
    assert running[-1].call is other
    assert 10 < other.passed <= 256


def test_a_worker_with_nothing_to_do_takes_over_from_the_longest_lane() -> None:
    state = fleet(2, capacity=100)
    prefix = blocks("p", 60)
    state.workers["w1"].open = False
    (first,) = ask(state, call(prefix, output=600))
    waiting = [call(blocks(f"q{i}", 20, prefix), output=600) for i in range(8)]
    assert ask(state, *waiting) == []
    state.workers["w1"].open = True
    taken = decide(state, 1.0)
    assert {a.worker for a in taken} == {"w1"}
    assert {a.reason for a in taken} == {"idle"}
    assert first.worker == "w0"


def test_a_burst_of_arrivals_is_placed_in_several_decisions() -> None:
    state = fleet(16, max_running=1)
    for i in range(2000):
        state.enqueue(call(blocks(f"q{i}", 2)), 0.0)
    decisions = 1
    started = decide(state, 0.0)
    while state.unfinished:
        decisions += 1
        started += decide(state, 0.0)
    assert decisions > 4
    assert len(started) == 16
    assert state.queued == 2000 - 16


# -- what comes back


def test_the_room_of_a_finished_call_is_kept_for_the_next_of_its_run() -> None:
    for keeps in (True, False):
        state = fleet(1, capacity=100, keep_places=keeps)
        old = blocks("old run", 60)
        first, _ = ask(state, call(old, run_seq=1), call(blocks("beside it", 10), run_seq=2))
        new = call(blocks("new run", 60), run_seq=3)
        assert ask(state, new) == [], "no room"
        assert state.release(first.worker, first.call.id, 1.0)
        assert [a.call for a in decide(state, 1.0)] == ([] if keeps else [new])
        back = ask(state, call(blocks("reply", 4, old), run_seq=1), now=1.005)
        assert [a.cached_tokens for a in back] == ([60 * SIZE] if keeps else [])


def test_what_is_kept_in_vain_is_given_up() -> None:
    state = fleet(1, capacity=100)
    first, _ = ask(state, call(blocks("old run", 60), run_seq=1), call(blocks("beside it", 10), run_seq=2))
    new = call(blocks("new run", 60), run_seq=3)
    assert ask(state, new) == []
    assert state.release(first.worker, first.call.id, 1.0)
    assert decide(state, 1.0) == []
    end = state.returns.next_end()
    assert end is not None
    assert [a.call for a in decide(state, end)] == [new]


def test_runs_of_one_call_each_are_not_kept_waiting_by_what_others_have_left() -> None:
    """Nothing ever comes back, and nobody has said so: 32 at a time run on a worker whose KV holds a thousand."""
    state = fleet(1, capacity=10_000)
    running: deque[Assignment] = deque()
    waited = 0
    for index in range(3_000):
        now = 0.001 * index
        running += ask(state, call(blocks(f"run {index}", 9), run_seq=index + 1, group="w", node="only"), now=now)
        waited = max(waited, state.queued)
        if len(running) + state.queued >= 32:
            done = running.popleft()
            assert state.release(done.worker, done.call.id, now)
    assert waited == 0


# -- always


class Dispatching(RuleBasedStateMachine):
    """Any interleaving: no call is lost, none runs twice, no limit is passed."""

    def __init__(self) -> None:
        super().__init__()
        self.state = fleet(3, capacity=60, max_running=6)
        self.state.workers["w2"].models = frozenset({"demo", "other"})
        self.queued: dict[str, QueuedCall] = {}
        self.running: dict[str, Assignment] = {}
        self.now = 0.0

    @rule(
        chain=st.lists(st.sampled_from("ab"), max_size=6),
        tenant=st.sampled_from("xyz"),
        group=st.sampled_from(["", "g"]),
        model=st.sampled_from(["demo", "demo", "other"]),
        priority=st.integers(-2, 2),
        run=st.integers(0, 3),
        excluded=st.sampled_from([frozenset(), frozenset({"w0"}), frozenset({"w0", "w1", "w2"})]),
        output=st.integers(1, 300),
    )
    def arrive(self, chain: list[str], output: int, excluded: frozenset[str], **fields: Any) -> None:
        hints = {"priority": fields.pop("priority"), "run_seq": fields.pop("run")}
        hashes = tuple(hash(tuple(chain[: i + 1])) for i in range(len(chain)))
        one = call(hashes, output=float(output), exclude=excluded, **hints, **fields)
        self.queued[one.id] = one
        self.state.enqueue(one, self.now)

    @rule(pause=st.floats(0, 2))
    def decide(self, pause: float) -> None:
        self.now += pause
        for assignment in decide(self.state, self.now):
            taken = self.queued.pop(assignment.call.id)
            assert taken is assignment.call
            worker = self.state.workers[assignment.worker]
            assert worker.open
            assert taken.model in worker.models
            assert 0 <= assignment.cached_tokens <= taken.prompt_tokens
            self.running[taken.id] = assignment

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        assignment = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        finish(self.state, assignment)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        one = self.queued.pop(data.draw(st.sampled_from(sorted(self.queued))))
        assert self.state.withdraw(one)
        assert not self.state.withdraw(one)

    @rule(worker=st.sampled_from(["w0", "w1"]), is_open=st.booleans())
    def toggle(self, worker: str, is_open: bool) -> None:
        self.state.workers[worker].open = is_open

    @rule(worker=st.sampled_from(["w0", "w1", "w2"]))
    def restart(self, worker: str) -> None:
        self.state.workers[worker].clear()

    @invariant()
    def every_call_is_in_one_place(self) -> None:
        queued = [c.id for q in self.state.queues.values() for c in q]
        assert sorted(queued) == sorted(self.queued)
        assert self.state.queued == len(queued)
        running = [name for w in self.state.workers.values() for name in w.running]
        assert sorted(running) == sorted(self.running)
        for worker in self.state.workers.values():
            assert len(worker.running) <= 6
            assert worker.backlog_s(1.0) >= 0
            assert abs(worker.work - sum(a.work for a in worker.running.values())) < 1e-6

    def teardown(self) -> None:
        """Whatever happened, everything runs in the end."""
        for worker in self.state.workers.values():
            worker.open = True
        for _ in range(10_000):
            self.decide(1.0)
            if not self.running:
                break
            for assignment in self.running.values():
                finish(self.state, assignment)
            self.running.clear()
        assert not self.queued


Dispatching.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDispatching = Dispatching.TestCase


def test_models_take_turns_on_a_worker_that_has_several() -> None:
    state = fleet(0, default_running=1)
    state.join("w", frozenset({"a", "b"}), SIZE, None)
    for model in "aaaabb":
        state.enqueue(call(model=model), 0.0)
    order = []
    while assignments := decide(state, 0.0):
        for assignment in assignments:
            order.append(assignment.call.model)
            finish(state, assignment)
    assert sorted(order[:4]) == ["a", "a", "b", "b"]


def test_a_worker_on_probation_is_given_no_more_than_it_may() -> None:
    state = fleet(1)
    state.workers["w0"].allowance = 1
    assert len(ask(state, *(call() for _ in range(5)))) == 1
    state.workers["w0"].allowance = None
    assert len(decide(state, 0.0)) == 4
