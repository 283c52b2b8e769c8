"""Cost-based, cache-aware scheduling (arXiv 2603.16104): assign a plan's operators to workers and order them.

The paper's solver partitions operators over the workers and walks each worker's part of the radix tree depth first,
by critical path. `walk` is that, made a family: whenever a worker is free, it takes the schedulable operator with
the longest critical path, less what the operator must prefill behind the worker's last call, weighted by `reuse`. An
infinite weight is the paper's depth-first walk (finish the subtree at hand), zero plain critical path first. A part
of the tree may be bound to each worker (`partition`, which replicates a shared prefix where balance asks for it) or
left to whoever is free. `solve` tries some members of the family, keeps the best by the paper's objective, and
improves it by local search (`improve`) while its budget of operator evaluations lasts.

Choosing costs O(depth · log n) a step: every branching node keeps a heap of the schedulable operators below it, and
the best for a worker is at the top of a heap on the path of its last call. Not attempted: preemption, insertion into
gaps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf, isinf

from helium_proxy.planner.improve import improve
from helium_proxy.planner.problem import Problem, Solution

Home = Sequence[int] | None
"""Worker each operator is bound to; None: any eligible one."""

_WALK_COST = 16
"""A walk's time per operator, in evaluations of one operator."""
_ABOUT = 1.005
"""Makespans within this factor are about equal."""


class _Ready:
    """Schedulable operators by (worker they are bound to or -1, tree node), best first."""

    def __init__(self, problem: Problem, reuse: float, home: Home) -> None:
        # All mutable state: (home, node) → heap of (-score behind that node, release step, operator); who has gone.
        self.heaps: dict[tuple[int, int], list[tuple[float, float, int]]] = {}
        self.gone = bytearray(problem.size)
        self.problem = problem
        self.reuse = reuse
        self.home = home

    def add(self, j: int, release: float) -> None:
        problem, heaps = self.problem, self.heaps
        bound = -1 if self.home is None else self.home[j]
        tail = problem.tail[j]
        prompt = problem.prompt[j]
        if isinf(self.reuse):
            weight = 0.0
        else:
            weight = self.reuse * problem.length[j] / problem.capacity[problem.eligible[j][0]]
        for node, depth in problem.paths[j]:
            entry = (weight * (prompt - depth if depth < prompt else 0.0) - tail, release, j)
            heap = heaps.get((bound, node))
            if heap is None:
                heaps[bound, node] = [entry]
            else:
                heapq.heappush(heap, entry)

    def _top(self, bound: int, node: int) -> tuple[float, float, int] | None:
        heap = self.heaps.get((bound, node))
        while heap:
            if not self.gone[heap[0][2]]:
                return heap[0]
            heapq.heappop(heap)
        return None

    def take(self, bound: int, last: int, roots: Sequence[int]) -> int | None:
        """The best operator behind call `last` (-1: none yet), removed; None: nothing is schedulable."""
        best: tuple[float, float, int] | None = None
        if last >= 0:
            for node, _ in reversed(self.problem.paths[last]):  # deepest first: the more shared prefix
                top = self._top(bound, node)
                if top is not None and (best is None or top < best):
                    best = top
                    if isinf(self.reuse):
                        break
        if best is None or not isinf(self.reuse):
            for node in roots:
                top = self._top(bound, node)
                if top is not None and (best is None or top < best):
                    best = top
        if best is None:
            return None
        self.gone[best[2]] = True
        return best[2]


def walk(problem: Problem, reuse: float, home: Home) -> Solution:
    """Schedule greedily, event by event. A worker with nothing schedulable waits for the next release, so the walk
    always ends; one bound by `home` takes nobody else's operators."""
    size, workers = problem.size, len(problem.capacity)
    ready = _Ready(problem, reuse, home)
    roots: list[list[int]] = [[] for _ in range(workers)]
    for j in range(size):
        root = problem.paths[j][0][0]
        for k in problem.eligible[j]:
            if root not in roots[k]:
                roots[k].append(root)
    waiting = [len(deps) for deps in problem.deps]
    releases = [(0.0, j) for j in range(size) if not waiting[j]]  # heap: when inputs are there
    release = [0.0] * size
    free = [(0.0, k) for k in range(workers)]  # heap: when a worker can start its next call
    idle: list[int] = []  # workers with nothing to do until something is released
    last = [-1] * workers
    order: list[int] = []
    worker = [0] * size
    begin, complete, prefill = [0.0] * size, [0.0] * size, [0.0] * size
    while free or (idle and releases):
        if idle and releases and (not free or releases[0][0] <= free[0][0]):
            now = releases[0][0]
            for k in idle:
                heapq.heappush(free, (now, k))
            idle.clear()
        now, k = heapq.heappop(free)
        while releases and releases[0][0] <= now:
            step, j = heapq.heappop(releases)
            ready.add(j, step)
        chosen = ready.take(-1 if home is None else k, last[k], roots[k])
        if chosen is None:
            idle.append(k)
            continue
        new = problem.prompt[chosen] - (problem.shared(chosen, last[k]) if last[k] >= 0 else 0.0)
        end = now + (problem.length[chosen] * new + problem.decode[chosen]) / problem.capacity[k]
        order.append(chosen)
        worker[chosen], begin[chosen], complete[chosen], prefill[chosen] = k, now, end, new
        last[k] = chosen
        heapq.heappush(free, (end, k))
        for consumer in problem.consumers[chosen]:
            waiting[consumer] -= 1
            release[consumer] = max(release[consumer], end + problem.delay[chosen])
            if not waiting[consumer]:
                heapq.heappush(releases, (release[consumer], consumer))
    return Solution(tuple(order), tuple(worker), tuple(begin), tuple(complete), tuple(prefill))


def partition(problem: Problem, grain: int) -> list[int]:
    """Bind every operator to a worker: subtrees of the radix tree, largest first, each to the least loaded worker. A
    subtree of more than a `grain`-th of a worker's fair share is split, and its prefix thereby replicated."""
    below: dict[int, list[int]] = {}
    children: dict[int, dict[int, None]] = {}
    for j, path in enumerate(problem.paths):
        for node, _ in path:
            below.setdefault(node, []).append(j)
        for (node, _), (child, _) in pairwise(path):
            children.setdefault(node, {})[child] = None
    usage = problem.least_usage
    fair = sum(usage) / len(problem.capacity) / grain
    home = [-1] * problem.size
    load = [0.0] * len(problem.capacity)
    units: list[list[int]] = []
    stack = list(dict.fromkeys(path[0][0] for path in problem.paths))
    while stack:
        node = stack.pop()
        members = below[node]
        inner = children.get(node)
        if inner is None or len(members) == 1 or sum(usage[j] for j in members) <= fair:
            units.append(members)
            continue
        stack.extend(inner)
        covered = {j for child in inner for j in below[child]}
        units.extend([j] for j in members if j not in covered)
    weight = [sum(usage[j] for j in unit) for unit in units]
    for i in sorted(range(len(units)), key=lambda i: (-weight[i], units[i][0])):
        members = [j for j in units[i] if home[j] < 0]
        if not members:
            continue
        k = min(problem.eligible[members[0]], key=lambda k: (load[k], k))
        load[k] += sum(usage[j] for j in members) * problem.capacity[0] / problem.capacity[k]
        for j in members:
            home[j] = k
    return home


def by_row(problem: Problem) -> list[int]:
    """Bind every operator to a worker so that the rows of the inputs stay together, largest row first."""
    usage = problem.least_usage
    rows: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for j in range(problem.size):
        rows.setdefault((problem.group[j], tuple(problem.eligible[j])), []).append(j)
    home = [0] * problem.size
    load = [0.0] * len(problem.capacity)
    for (_, eligible), members in sorted(rows.items(), key=lambda item: -sum(usage[j] for j in item[1])):
        k = min(eligible, key=lambda k: (load[k], k))
        load[k] += sum(usage[j] for j in members)
        for j in members:
            home[j] = k
    return home


def starts(problem: Problem) -> Iterator[Solution]:
    """First schedules, the most promising first."""
    yield walk(problem, inf, None)
    several = len(problem.capacity) > 1
    if several and len(set(problem.group)) > 1:
        yield walk(problem, inf, by_row(problem))
    yield walk(problem, 1.0, None)
    if several:
        yield walk(problem, 1.0, partition(problem, 4))
        yield walk(problem, inf, partition(problem, 1))
    yield walk(problem, 0.0, None)
    if several:
        yield walk(problem, 0.0, partition(problem, 4))
    yield walk(problem, 4.0, None)


def solve(problem: Problem, effort: int = 45_000) -> Solution:
    """The best schedule found within about `effort` operator evaluations; at least one walk. Deterministic.

    Of first schedules about equally long, the one that computes the fewest prompt tokens is improved: what it saves
    counts beyond the objective, which sees only the call before, while the engine's cache holds more.
    """
    if not problem.size:
        return Solution((), (), (), (), ())
    tried: list[Solution] = []
    for solution in starts(problem):
        tried.append(solution)
        if len(tried) * _WALK_COST * problem.size >= effort:
            break
    shortest = min(solution.makespan for solution in tried)
    close = [solution for solution in tried if solution.makespan <= shortest * _ABOUT]
    best = min(close, key=lambda solution: (sum(solution.prefill), solution.makespan))
    return improve(problem, best, effort - len(tried) * _WALK_COST * problem.size)
