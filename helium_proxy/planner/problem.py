"""A scheduling instance of the paper's form (arXiv 2603.16104, cache-aware scheduling), and how a solution is valued.

Operators are numbered 0…n-1, producers first. A solution is one global order (producers first) and a worker for each
operator; it runs every worker's operators in that order, each as early as the worker and its inputs allow. Every
schedule worth having has this form: list the operators by start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from helium_proxy.planner.cost import PlanWorker, decode_usage, precedence_delay
from helium_proxy.planner.trie import TemplatedRadixTree


@dataclass(frozen=True, slots=True)
class Solution:
    """`begin` and `complete` in token steps, by operator number; `prefill` in prompt tokens computed (u_p)."""

    order: tuple[int, ...]
    worker: tuple[int, ...]
    begin: tuple[float, ...]
    complete: tuple[float, ...]
    prefill: tuple[float, ...]

    @property
    def makespan(self) -> float:
        """The largest completion step."""
        return max(self.complete, default=0.0)

    @property
    def value(self) -> tuple[float, float]:
        """Less is better: makespan, then prompt tokens computed."""
        return self.makespan, sum(self.prefill)


@dataclass(frozen=True)
class Problem:
    """`paths[j]`: (tree node, depth in tokens) from the root down operator j's path, the root and the nodes it shares
    with other operators; `eligible[j]`: workers that serve its model."""

    length: Sequence[float]
    prompt: Sequence[float]
    deps: Sequence[Sequence[int]]
    paths: Sequence[Sequence[tuple[int, float]]]
    eligible: Sequence[Sequence[int]]
    capacity: Sequence[float]
    group: Sequence[int] = field(default=())
    """The input row of each operator, for placements that keep rows together."""

    def __post_init__(self) -> None:
        assert all(dep < j for j, deps in enumerate(self.deps) for dep in deps), "producers come first"
        assert all(self.eligible), "every operator needs a worker"

    @property
    def size(self) -> int:
        return len(self.length)

    @cached_property
    def consumers(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.length]
        for j, deps in enumerate(self.deps):
            for dep in deps:
                found[dep].append(j)
        return found

    @cached_property
    def delay(self) -> list[float]:
        return [precedence_delay(length) for length in self.length]

    @cached_property
    def decode(self) -> list[float]:
        return [decode_usage(length) for length in self.length]

    @cached_property
    def least_usage(self) -> list[float]:
        """Steps no schedule can save: the part of the prompt that no other operator shares, and the decode."""
        fastest = [max(self.capacity[k] for k in workers) for workers in self.eligible]
        found = []
        for j, path in enumerate(self.paths):
            own = self.prompt[j] - min(path[-1][1], self.prompt[j])
            found.append((self.length[j] * own + self.decode[j]) / fastest[j])
        return found

    @cached_property
    def tail(self) -> list[float]:
        """Critical path: least steps from an operator's start to the end of everything that follows from it."""
        tail = [0.0] * self.size
        for j in range(self.size - 1, -1, -1):
            after = max((tail[c] for c in self.consumers[j]), default=0.0)
            tail[j] = self.least_usage[j] + (self.delay[j] + after if self.consumers[j] else 0.0)
        return tail

    @property
    def lower_bound(self) -> float:
        """No makespan is below the longest chain, nor below the least usage spread evenly."""
        return max(max(self.tail, default=0.0), sum(self.least_usage) / max(1, len(self.capacity)))

    def shared(self, j: int, previous: int) -> float:
        """Prompt tokens of j on the path of the call before it."""
        depth = 0.0
        for one, other in zip(self.paths[j], self.paths[previous], strict=False):
            if one is not other and one != other:
                break
            depth = one[1]
        return min(depth, self.prompt[j])

    def evaluate(self, order: Sequence[int], worker: Sequence[int]) -> Solution:
        """Time a solution. O(operators × path + edges)."""
        size = self.size
        begin, complete, prefill = [0.0] * size, [0.0] * size, [0.0] * size
        free = [0.0] * len(self.capacity)
        last = [-1] * len(self.capacity)
        for j in order:
            k = worker[j]
            start = free[k]
            for dep in self.deps[j]:
                start = max(start, complete[dep] + self.delay[dep])
            new = self.prompt[j] - (self.shared(j, last[k]) if last[k] >= 0 else 0.0)
            begin[j], prefill[j] = start, new
            complete[j] = free[k] = start + (self.length[j] * new + self.decode[j]) / self.capacity[k]
            last[k] = j
        return Solution(tuple(order), tuple(worker), tuple(begin), tuple(complete), tuple(prefill))


def make_problem(
    tree: TemplatedRadixTree,
    deps: Mapping[int, Sequence[int]],
    models: Mapping[int, str],
    workers: Sequence[PlanWorker],
    rows: Mapping[int, int] | None = None,
) -> tuple[Problem, list[int]]:
    """The instance for a tree and workers, and the operator id behind each of its numbers. Operators whose model no
    worker serves may go anywhere: the dispatcher answers for them, and `explain` warns of them."""
    ids = sorted(tree.paths)
    number = {id_: j for j, id_ in enumerate(ids)}
    everywhere = tuple(range(len(workers)))
    serving = {
        model: tuple(k for k in everywhere if workers[k].serves(model)) or everywhere
        for model in set(models.values())
    }
    passing = Counter(chain.from_iterable(tree.paths.values()))
    step = {node: (node.index, node.depth) for node in passing}
    return (
        Problem(
            length=[tree.lengths[id_] for id_ in ids],
            prompt=[tree.prompts[id_] for id_ in ids],
            deps=[tuple(number[dep] for dep in deps[id_] if dep in number) for id_ in ids],
            paths=[
                tuple(step[node] for i, node in enumerate(tree.paths[id_]) if i == 0 or passing[node] > 1)
                for id_ in ids
            ],
            eligible=[serving[models[id_]] for id_ in ids],
            capacity=[float(worker.kv_tokens) for worker in workers],
            group=[rows[id_] if rows is not None else 0 for id_ in ids],
        ),
        ids,
    )
