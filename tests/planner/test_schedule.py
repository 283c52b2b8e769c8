"""Schedules: feasible, deterministic, close to optimal, and quick to make."""

from __future__ import annotations

import itertools
import time
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helium_proxy.planner.cost import PlanWorker, token_usage
from helium_proxy.planner.graph import expand
from helium_proxy.planner.pipeline import Planning, make_physical
from helium_proxy.planner.plan import parse_plan
from helium_proxy.planner.problem import Problem, Solution, make_problem
from helium_proxy.planner.schedule import by_row, partition, solve, starts, walk
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.planner.trie import build_trie


def problem_of(raw: dict[str, Any], workers: list[PlanWorker]) -> Problem:
    operators = expand(parse_plan({"model": "m", **raw}), PlanSettings())
    problem, _ = make_problem(
        build_trie(operators, lambda text, model: len(text)),
        {o.id: o.deps for o in operators.operators.values()},
        {o.id: o.template.model for o in operators.operators.values()},
        workers,
        {o.id: o.row for o in operators.operators.values()},
    )
    return problem


def check(problem: Problem, solution: Solution) -> None:
    """`solution` is a schedule: everything once, on a worker that serves it, when worker and inputs allow."""
    assert sorted(solution.order) == list(range(problem.size))
    for j in range(problem.size):
        assert solution.worker[j] in problem.eligible[j]
        for dep in problem.deps[j]:
            assert solution.begin[j] >= solution.complete[dep] + problem.delay[dep] - 1e-6
    for k, capacity in enumerate(problem.capacity):
        mine = sorted((j for j in range(problem.size) if solution.worker[j] == k), key=lambda j: solution.begin[j])
        for i, j in enumerate(mine):
            new = problem.prompt[j] - (problem.shared(j, mine[i - 1]) if i else 0)
            assert solution.prefill[j] == pytest.approx(new)
            usage = token_usage(problem.length[j], new, capacity)
            assert solution.complete[j] == pytest.approx(solution.begin[j] + usage)
            assert i == 0 or solution.begin[j] >= solution.complete[mine[i - 1]] - 1e-6
    assert solution.makespan >= problem.lower_bound - 1e-6


def best_of_all(problem: Problem) -> float:
    """The optimum, by trying every order and placement."""
    best = inf
    for order in itertools.permutations(range(problem.size)):
        place = {j: i for i, j in enumerate(order)}
        if any(place[dep] > place[j] for j in range(problem.size) for dep in problem.deps[j]):
            continue
        for worker in itertools.product(*problem.eligible):
            best = min(best, problem.evaluate(order, worker).makespan)
    return best


WORKERS = [PlanWorker("w0", kv_tokens=120), PlanWorker("w1", kv_tokens=120)]


@st.composite
def instances(draw: st.DrawFn, most: int = 9) -> dict[str, Any]:
    size = draw(st.integers(1, most))
    prefixes = ["a" * 40, "a" * 20 + "b" * 30, "c" * 25]
    nodes = []
    for i in range(size):
        deps = draw(st.lists(st.integers(0, i - 1), max_size=2, unique=True)) if i else []
        text = draw(st.sampled_from(prefixes)) + str(i) + "".join(f"{{{{nodes.n{dep}}}}}" for dep in deps)
        nodes.append({"id": f"n{i}", "prompt": text, "params": {"max_tokens": draw(st.sampled_from([4, 16, 40]))}})
    return {"nodes": nodes, "inputs": [{}] * draw(st.integers(1, 2))}


@settings(max_examples=40, deadline=None)
@given(instances(), st.sampled_from([0.0, 1.0, inf]), st.sampled_from([1, 2, 3]))
def test_every_walk_is_a_schedule(raw: dict[str, Any], reuse: float, workers: int) -> None:
    problem = problem_of(raw, [PlanWorker(f"w{k}", kv_tokens=100 + 50 * k) for k in range(workers)])
    for home in (None, partition(problem, 1), partition(problem, 4), by_row(problem)):
        found = walk(problem, reuse, home)
        check(problem, found)
        if home is not None:
            assert list(found.worker) == home
        again = problem.evaluate(found.order, found.worker)
        assert again.makespan == pytest.approx(found.makespan)


@settings(max_examples=25, deadline=None)
@given(instances())
def test_solutions_are_schedules_no_worse_than_the_walks_and_always_the_same(raw: dict[str, Any]) -> None:
    problem = problem_of(raw, WORKERS)
    found = solve(problem, 20_000)
    check(problem, found)
    assert found.makespan <= min(s.makespan for s in starts(problem)) * 1.005 + 1e-9
    assert solve(problem, 20_000) == found


@settings(max_examples=12, deadline=None)
@given(instances(most=4))
def test_tiny_instances_are_solved_to_the_optimum(raw: dict[str, Any]) -> None:
    problem = problem_of({**raw, "inputs": [{}]}, WORKERS)
    assert solve(problem).makespan == pytest.approx(best_of_all(problem), rel=0.006)


def test_milp_agrees_with_trying_everything() -> None:
    pytest.importorskip("scipy")
    from benchmarks.optimality import solve_milp

    nodes = [
        {"id": "a", "prompt": "p" * 50 + "1"},
        {"id": "b", "prompt": "p" * 50 + "2"},
        {"id": "c", "prompt": "q" * 30},
        {"id": "d", "prompt": "q" * 30 + "{{nodes.a}}{{nodes.c}}"},
    ]
    problem = problem_of({"nodes": nodes, "params": {"max_tokens": 8}}, WORKERS)
    poor = problem.evaluate(range(problem.size), [0] * problem.size)
    found = solve_milp(problem, poor, 20)
    assert found.proven
    assert found.makespan == pytest.approx(best_of_all(problem), rel=1e-4)
    assert found.makespan is not None
    assert found.makespan < poor.makespan


@pytest.mark.parametrize("shape", ["map-reduce", "debate", "reflection", "iterative", "parallel", "trading"])
def test_gap_to_the_milp_on_one_instance_of_each_shape(shape: str) -> None:
    pytest.importorskip("scipy")
    from benchmarks.optimality import compare

    one = compare(shape, 0, 20)
    assert one["proven"]
    assert one["gap"] <= 0.009


def test_a_shared_prefix_is_kept_together_while_that_pays() -> None:
    """Two families of calls on two workers: each family's long prefix is computed once."""
    nodes = [{"id": f"{f}{i}", "prompt": f * 400 + str(i)} for i in range(4) for f in "ab"]
    problem = problem_of(
        {"nodes": nodes, "params": {"max_tokens": 8}}, [PlanWorker(w, kv_tokens=1_000) for w in "xy"]
    )
    found = solve(problem)
    assert sum(found.prefill) == 2 * 400 + 8


def test_a_shared_prefix_is_replicated_where_balance_asks_for_it() -> None:
    nodes = [{"id": f"n{i}", "prompt": "a" * 50 + str(i)} for i in range(16)]
    problem = problem_of({"nodes": nodes, "params": {"max_tokens": 64}}, [PlanWorker(w, kv_tokens=500) for w in "xy"])
    found = solve(problem)
    assert sorted(found.worker) == [0] * 8 + [1] * 8
    assert sum(found.prefill) == 2 * 50 + 16


def test_operators_go_to_workers_of_their_model() -> None:
    workers = [PlanWorker("x", models=frozenset({"m"})), PlanWorker("y", models=frozenset({"other"}))]
    nodes = [{"id": f"n{i}", "prompt": "a", "model": "other" if i % 2 else "m"} for i in range(6)]
    nodes.append({"id": "lost", "prompt": "a", "model": "nobody"})
    problem = problem_of({"nodes": nodes}, workers)
    assert [list(e) for e in problem.eligible] == [[0], [1]] * 3 + [[0, 1]]
    check(problem, solve(problem))


def test_nothing_to_schedule() -> None:
    assert solve(Problem([], [], [], [], [], [1.0])).makespan == 0


def trading(inputs: int) -> dict[str, Any]:
    """The paper's Trading workflow: 88 calls a run."""

    def node(name: str, role: str, user: str) -> dict[str, Any]:
        system = f"You are the {role}. " + role * 150
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return {"id": name, "messages": messages}

    analysts = ("fundamentals", "market", "news", "social")
    reports = "\n".join(f"{{{{nodes.{name}}}}}" for name in analysts)
    nodes = [node(name, name, f"{{{{inputs.{name}}}}}") for name in analysts]
    said = reports
    for turn in range(4):
        side = ("bull", "bear")[turn % 2]
        nodes.append(node(f"{side}_{turn}", side, said))
        said += f"{{{{nodes.{side}_{turn}}}}}"
    nodes.append(node("manager", "manager", said))
    ends = []
    for branch in range(8):
        nodes.append(node(f"trader_{branch}", "trader", f"{reports}{{{{nodes.manager}}}} style {branch}"))
        said = f"{reports}{{{{nodes.trader_{branch}}}}}"
        turns = 9 if branch < 6 else 8
        for turn in range(turns - (branch >= 6)):
            role = ("risky", "safe", "neutral")[turn % 3]
            nodes.append(node(f"{role}_{branch}_{turn}", role, said))
            said += f"{{{{nodes.{role}_{branch}_{turn}}}}}"
        ends.append(nodes[-1]["id"])
    nodes.append(node("fund", "fund", reports + "".join(f"{{{{nodes.{end}}}}}" for end in ends)))
    nodes.append(node("audit", "audit", "{{nodes.fund}}"))
    nodes.append(node("report", "report", "{{nodes.fund}}{{nodes.audit}}"))
    rows = [
        {name: f"{name} of company {row} " + f"{row} report " * 300 for name in analysts} for row in range(inputs)
    ]
    return {
        "workflow": "trading",
        "model": "m",
        "params": {"temperature": 0, "max_tokens": 128},
        "nodes": nodes[:88],
        "inputs": rows,
    }


def test_planning_trading_over_sixteen_inputs_is_quick() -> None:
    plan = parse_plan(trading(16))
    planning = Planning(workers=[PlanWorker("w0"), PlanWorker("w1")])
    spent = inf
    for _ in range(3):
        began = time.process_time()
        physical = make_physical(plan, planning)
        spent = min(spent, time.process_time() - began)
    assert len(physical.ids) == 1_408
    check(physical.problem, physical.solution)
    assert physical.solution.makespan <= 1.35 * physical.problem.lower_bound
    assert physical.forecast.computed_tokens < 0.55 * sum(physical.tree.prompts.values())
    assert spent < 0.6, "230 ms on a quiet machine; see benchmarks/planning.py"
