"""How far the planner's schedules are from optimal: against a MILP of the paper's objective, solved by HiGHS.

    python -m benchmarks.optimality [--instances N] [--limit SECONDS] [--out FILE]

Small instances of all six workflow shapes of the paper, seeded: one to three inputs, one to three workers, prompt and
output sizes drawn around the paper's grid. The gap is (ours - best) / best, where best is the MILP's optimum; when
HiGHS reaches its time limit first, its proven lower bound takes the optimum's place: the gap is never understated.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.graph import expand
from helium_proxy.planner.plan import parse_plan
from helium_proxy.planner.problem import Problem, Solution, make_problem
from helium_proxy.planner.schedule import solve, starts
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.planner.trie import build_trie

SHAPES = ("map-reduce", "debate", "reflection", "iterative", "parallel", "trading")


def _node(name: str, system: str, user: str, length: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"id": name, "messages": messages, "params": {"max_tokens": length, "temperature": 0}}


def instance(shape: str, seed: int) -> tuple[dict[str, Any], list[PlanWorker]]:
    """A plan of at most ten operators, and workers whose KV holds one to eight of its prompts."""
    rng = random.Random(f"{shape}-{seed}")
    scale = rng.choice((64, 128, 256))

    def text(tokens: int) -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=4 * tokens))

    def role(name: str) -> str:
        return roles.setdefault(name, f"You are the {name}. " + text(rng.choice((1, 2, 4)) * scale))

    def length() -> int:
        return rng.choice((1, 2, 4)) * scale // 4

    roles: dict[str, str] = {}
    nodes: list[dict[str, Any]] = []
    rows = 1
    if shape == "map-reduce":
        rows, experts = rng.choice(((1, 5), (2, 3), (3, 2), (1, 7)))
        nodes = [_node(f"e{i}", role(f"expert {i}"), "{{inputs.q}}", length()) for i in range(experts)]
        nodes.append(
            _node(
                "sum",
                role("editor"),
                "{{inputs.q}}" + "".join(f"{{{{nodes.e{i}}}}}" for i in range(experts)),
                length(),
            )
        )
    elif shape == "debate":
        rows, agents = rng.choice(((1, 3), (2, 2), (1, 4)))
        said = "".join(f"{{{{nodes.a{i}r0}}}}" for i in range(agents))
        nodes = [_node(f"a{i}r0", role(f"agent {i}"), "{{inputs.q}}", length()) for i in range(agents)]
        nodes += [_node(f"a{i}r1", role(f"agent {i}"), "{{inputs.q}}" + said, length()) for i in range(agents)]
    elif shape == "reflection":
        rows = rng.choice((1, 2))
        nodes = [
            _node("draft", role("expert"), "{{inputs.q}}", length()),
            _node("c0", role("critic 0"), "{{inputs.q}}{{nodes.draft}}", length()),
            _node("c1", role("critic 1"), "{{inputs.q}}{{nodes.draft}}", length()),
            _node("final", role("expert"), "{{inputs.q}}{{nodes.draft}}{{nodes.c0}}{{nodes.c1}}", length()),
        ]
    elif shape == "iterative":
        rows, chunks = rng.choice(((2, 4), (3, 3), (4, 2)))
        nodes = [
            _node(
                f"s{i}", role("writer"), f"{{{{inputs.c{i}}}}}" + (f"{{{{nodes.s{i - 1}}}}}" if i else ""), length()
            )
            for i in range(chunks)
        ]
    elif shape == "parallel":
        experts, chunks = rng.choice(((2, 3), (3, 2), (2, 2)))
        for e in range(experts):
            nodes += [
                _node(
                    f"x{e}s{i}",
                    role(f"expert {e}"),
                    f"{{{{inputs.c{i}}}}}" + (f"{{{{nodes.x{e}s{i - 1}}}}}" if i else ""),
                    length(),
                )
                for i in range(chunks)
            ]
        heard = "".join(f"{{{{nodes.x{e}s{chunks - 1}}}}}" for e in range(experts))
        nodes.append(_node("writer", role("writer"), heard, length()))
    else:
        nodes = [_node(f"an{i}", role(f"analyst {i}"), "{{inputs.q}}", length()) for i in range(2)]
        reports = "{{nodes.an0}}{{nodes.an1}}"
        nodes.append(_node("bull", role("bull"), reports, length()))
        nodes.append(_node("bear", role("bear"), reports + "{{nodes.bull}}", length()))
        nodes.append(_node("manager", role("manager"), reports + "{{nodes.bull}}{{nodes.bear}}", length()))
        branches = rng.choice((2, 3))
        nodes += [
            _node(f"trader{b}", role("trader"), reports + f"{{{{nodes.manager}}}} style {b}", length())
            for b in range(branches)
        ]
        traders = "".join(f"{{{{nodes.trader{b}}}}}" for b in range(branches))
        nodes.append(_node("fund", role("fund"), reports + traders, length()))
    columns = ["q", *(f"c{i}" for i in range(4))]
    inputs = [{name: text(rng.choice((1, 2)) * scale) for name in columns} for _ in range(rows)]
    kv = rng.choice((1, 2, 4, 8)) * scale * 6
    workers = [PlanWorker(f"w{k}", kv_tokens=kv) for k in range(rng.choice((1, 2, 2, 3)))]
    return {"workflow": shape, "model": "m", "nodes": nodes, "inputs": inputs}, workers


def problem_of(raw: dict[str, Any], workers: list[PlanWorker]) -> Problem:
    graph = expand(parse_plan(raw), PlanSettings())
    operators = graph.operators.values()
    problem, _ = make_problem(
        build_trie(graph),
        {o.id: o.deps for o in operators},
        {o.id: o.template.model for o in operators},
        workers,
        {o.id: o.row for o in operators},
    )
    return problem


@dataclass(frozen=True)
class Optimum:
    makespan: float | None
    """The best schedule HiGHS found."""
    bound: float
    """No schedule is shorter."""
    proven: bool
    seconds: float


def solve_milp(problem: Problem, ours: Solution, limit: float) -> Optimum:
    """The paper's scheduling problem as a MILP, with arc variables for each worker's sequence.

    x[k,i,j]: j follows i on worker k (i = n: j is first; j = n: i is last). b[j]: start step. C: makespan.
    `ours` bounds C from above: what HiGHS does not find below it, it proves not to exist.
    """
    size, count = problem.size, len(problem.capacity)
    followers = _followers(problem)
    index = {
        (k, i, j): position
        for position, (k, i, j) in enumerate(
            (k, i, j)
            for k in range(count)
            for i in range(size + 1)
            for j in range(size + 1)
            if i != j and (size in (i, j) or i not in followers[j])
        )
    }
    arcs = len(index)
    start, makespan = arcs, arcs + size
    width = arcs + size + 1

    def usage(k: int, i: int, j: int) -> float:
        new = problem.prompt[j] - (problem.shared(j, i) if i < size else 0.0)
        return (problem.length[j] * new + problem.decode[j]) / problem.capacity[k]

    rows: list[tuple[dict[int, float], float, float]] = []
    top = ours.makespan * (1 + 1e-6)
    head = [0.0] * size
    for j in range(size):
        head[j] = max((head[d] + problem.least_usage[d] + problem.delay[d] for d in problem.deps[j]), default=0.0)
    tail = [problem.tail[j] - problem.least_usage[j] for j in range(size)]
    into: dict[int, dict[int, float]] = {j: {} for j in range(size)}
    for (k, i, j), column in index.items():
        if j < size:
            into[j][column] = usage(k, i, j)
    for j in range(size):
        rows.append((dict.fromkeys(into[j], 1.0), 1, 1))
        rows.append(({makespan: 1, start + j: -1, **{c: -u for c, u in into[j].items()}}, tail[j], np.inf))
        for dep in problem.deps[j]:
            row = {start + j: 1.0, start + dep: -1.0, **{c: -u for c, u in into[dep].items()}}
            rows.append((row, problem.delay[dep], np.inf))
    for k in range(count):
        first = {index[k, size, j]: 1.0 for j in range(size)}
        rows.append((first, 0, 1))
        load = {makespan: 1.0}
        for (kk, i, j), column in index.items():
            if kk == k and j < size:
                load[column] = -usage(k, i, j) - (head[j] if i == size else 0.0)
            elif kk == k and i < size:
                load[column] = -tail[i]
        rows.append((load, 0, np.inf))
        for j in range(size):
            flow = {index[k, i, j]: 1.0 for i in range(size + 1) if (k, i, j) in index}
            for i in range(size + 1):
                if (k, j, i) in index:
                    flow[index[k, j, i]] = -1.0
            rows.append((flow, 0, 0))
        if k and problem.capacity[k] == problem.capacity[k - 1]:
            order = {index[k - 1, size, j]: float(j) - size for j in range(size)}
            order.update({index[k, size, j]: size - float(j) for j in range(size)})
            rows.append((order, -np.inf, 0))  # equal workers: the first calls in order of operator
    for i in range(size):
        for j in range(size):
            if i == j or (0, i, j) not in index:
                continue
            big = top - tail[i] - head[j]
            row = {start + j: 1.0, start + i: -1.0, **{c: -u for c, u in into[i].items()}}
            for k in range(count):
                row[index[k, i, j]] = row.get(index[k, i, j], 0.0) - big
            rows.append((row, -big, np.inf))
    data, r, c, low, high = [], [], [], [], []
    for number, (row, lower, upper) in enumerate(rows):
        for column, value in row.items():
            data.append(value)
            r.append(number)
            c.append(column)
        low.append(lower)
        high.append(upper)
    matrix = coo_array((data, (r, c)), shape=(len(rows), width)).tocsc()
    lower_bounds = np.zeros(width)
    lower_bounds[start : start + size] = head
    lower_bounds[makespan] = problem.lower_bound
    upper_bounds = np.ones(width)
    upper_bounds[start : start + size] = [top - tail[j] - problem.least_usage[j] + 1e-6 for j in range(size)]
    upper_bounds[makespan] = top + 1e-6
    cost = np.zeros(width)
    cost[makespan] = 1
    integrality = np.concatenate([np.ones(arcs), np.zeros(size + 1)])
    began = time.perf_counter()
    result = milp(
        cost,
        constraints=LinearConstraint(matrix, low, high),
        bounds=Bounds(lower_bounds, upper_bounds),
        integrality=integrality,
        options={"time_limit": limit, "mip_rel_gap": 1e-4},
    )
    seconds = time.perf_counter() - began
    if result.status not in (0, 1):
        raise RuntimeError(f"HiGHS: {result.message}")
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else problem.lower_bound
    found = float(result.fun) if result.x is not None else None
    return Optimum(found, max(float(bound), problem.lower_bound), result.status == 0, seconds)


def _followers(problem: Problem) -> list[set[int]]:
    """Operator → all that depend on it, directly or not: they cannot come before it on a worker."""
    found: list[set[int]] = [set() for _ in range(problem.size)]
    for j in range(problem.size - 1, -1, -1):
        for consumer in problem.consumers[j]:
            found[j] |= {consumer} | found[consumer]
    return found


def compare(shape: str, seed: int, limit: float) -> dict[str, Any]:
    """One instance: our makespan, the first walk's, and the optimum or its bound."""
    problem = problem_of(*instance(shape, seed))
    began = time.perf_counter()
    ours = solve(problem)
    seconds = time.perf_counter() - began
    optimum = solve_milp(problem, ours, limit)
    best = optimum.makespan if optimum.proven and optimum.makespan is not None else optimum.bound
    best = min(best, ours.makespan)
    return {
        "shape": shape,
        "seed": seed,
        "operators": problem.size,
        "workers": len(problem.capacity),
        "ours": round(ours.makespan, 3),
        "greedy": round(next(starts(problem)).makespan, 3),
        "best": round(best, 3),
        "proven": optimum.proven,
        "gap": ours.makespan / best - 1,
        "greedy_gap": next(starts(problem)).makespan / best - 1,
        "ours_s": round(seconds, 4),
        "milp_s": round(optimum.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--instances", type=int, default=60)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for HiGHS, each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "optimality.json")
    args = parser.parse_args()
    found = []
    for number in range(args.instances):
        shape = SHAPES[number % len(SHAPES)]
        one = compare(shape, number // len(SHAPES), args.limit)
        found.append(one)
        print(
            f"[{number + 1}/{args.instances}] {shape:<11} {one['operators']:>2} operators, {one['workers']} workers: "
            f"ours {one['ours']:.1f}, best {one['best']:.1f}{'' if one['proven'] else ' (bound)'}, "
            f"gap {one['gap']:.2%} (first walk {one['greedy_gap']:.2%}), {one['ours_s'] * 1e3:.0f} ms, "
            f"HiGHS {one['milp_s']:.1f} s",
            flush=True,
        )
    summary = {
        "instances": len(found),
        "proven": sum(one["proven"] for one in found),
        "gap_mean": mean(one["gap"] for one in found),
        "gap_max": max(one["gap"] for one in found),
        "greedy_gap_mean": mean(one["greedy_gap"] for one in found),
        "greedy_gap_max": max(one["greedy_gap"] for one in found),
        "ours_ms_mean": 1e3 * mean(one["ours_s"] for one in found),
    }
    print(json.dumps(summary, indent=2))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"summary": summary, "instances": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
