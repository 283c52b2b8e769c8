"""Local search on a schedule: move an operator in the order, or to another worker, and keep what is better.

Simulated annealing with a fixed seed: worse neighbours are taken at first and ever more rarely later, which leaves
the local optima that a plain descent ends in. A plan so large that the budget buys few neighbours is left as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from math import exp

from helium_proxy.planner.problem import Problem, Solution

_RESTARTS = 3
_WARM = 0.08
"""First temperature, as a share of the makespan: a neighbour this much worse is taken once in e tries."""
_COLD = 0.0005
_FLOW = 0.02
"""Weight of the mean completion beside the makespan: among schedules equally long it prefers progress."""
_MATRIX = 400
"""Operators up to which shared prefixes are tabulated."""


def _pricing(problem: Problem) -> Callable[[list[int], list[int]], tuple[float, float]]:
    """(order, worker) → (makespan, mean completion), the same arithmetic as `Problem.evaluate`, tabulated."""
    size = problem.size
    deps = [tuple((dep, problem.delay[dep]) for dep in problem.deps[j]) for j in range(size)]
    # full[k][j]: steps of j on worker k behind no call; saved[k][j][i]: what following i saves.
    full = [
        [(problem.length[j] * problem.prompt[j] + problem.decode[j]) / capacity for j in range(size)]
        for capacity in problem.capacity
    ]
    shared = [[problem.shared(j, i) * problem.length[j] for i in range(size)] + [0.0] for j in range(size)]
    inverse = [1 / capacity for capacity in problem.capacity]
    idle = [0.0] * len(inverse)
    nobody = [size] * len(inverse)
    complete = [0.0] * size

    def price(order: list[int], worker: list[int]) -> tuple[float, float]:
        free, last = idle.copy(), nobody.copy()
        total = 0.0
        for j in order:
            k = worker[j]
            start = free[k]
            for dep, delay in deps[j]:
                ready = complete[dep] + delay
                if ready > start:  # noqa: PLR1730 - the hottest line of planning
                    start = ready
            complete[j] = end = start + full[k][j] - shared[j][last[k]] * inverse[k]
            free[k] = end
            last[k] = j
            total += end
        return max(free), total / size

    return price


def improve(problem: Problem, start: Solution, effort: int) -> Solution:
    """The best of `start` and what about `effort` operator evaluations find. Deterministic."""
    size = problem.size
    rounds = effort // size if size else 0
    bound = problem.lower_bound * (1 + 1e-9)
    if size < 2 or size > _MATRIX or rounds < 2 * size or start.makespan <= bound:
        return start
    price = _pricing(problem)
    rng = random.Random(size)
    best_order, best_worker = list(start.order), list(start.worker)
    best = price(best_order, best_worker)
    for restart in range(_RESTARTS):
        order, worker = best_order.copy(), best_worker.copy()
        current = best
        share = rounds // _RESTARTS
        warm = best[0] * _WARM / (1 + restart)
        cooling = (_COLD / _WARM * (1 + restart)) ** (1 / max(1, share))
        temperature = warm
        for _ in range(share):
            temperature *= cooling
            changed = _neighbour(problem, rng, order, worker)
            if changed is None:
                continue
            found = price(*changed)
            rise = (found[0] - current[0]) + _FLOW * (found[1] - current[1])
            if rise <= 0 or rng.random() < exp(-rise / temperature):
                order, worker = changed
                current = found
                if found[0] < best[0] - 1e-9:
                    best, best_order, best_worker = found, order.copy(), worker.copy()
        if best[0] <= bound:
            break
    improved = problem.evaluate(best_order, best_worker)
    return improved if improved.value < start.value else start


def _neighbour(
    problem: Problem, rng: random.Random, order: list[int], worker: list[int]
) -> tuple[list[int], list[int]] | None:
    """One operator elsewhere: another worker, another place between its producers and its consumers, or both; or two
    operators' workers exchanged."""
    size = len(order)
    at = int(rng.random() * size)
    j = order[at]
    choice = rng.random()
    placed = worker
    if choice < 0.5 and len(problem.eligible[j]) > 1:
        placed = worker.copy()
        placed[j] = rng.choice([k for k in problem.eligible[j] if k != worker[j]])
        if choice < 0.1:
            other = order[int(rng.random() * size)]
            if other != j and worker[j] in problem.eligible[other] and worker[other] == placed[j]:
                placed[other] = worker[j]
            return order, placed
        if choice < 0.2:
            return order, placed
    deps, consumers = problem.deps[j], problem.consumers[j]
    low, high = 0, size - 1
    for position in range(at - 1, -1, -1):
        if order[position] in deps:
            low = position + 1
            break
    for position in range(at + 1, size):
        if order[position] in consumers:
            high = position - 1
            break
    if low == high:
        return (order, placed) if placed is not worker else None
    to = low + int(rng.random() * (high - low))
    to += to >= at
    moved = order.copy()
    moved.insert(to, moved.pop(at))
    return moved, placed
