"""From a checked plan to an executable one: expand, rewrite, tree, schedule. Synchronous: run it in a thread."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from helium_proxy.planner.cost import Forecast, PlanWorker, forecast
from helium_proxy.planner.graph import OperatorGraph, expand
from helium_proxy.planner.plan import Plan
from helium_proxy.planner.problem import Problem, Solution, make_problem
from helium_proxy.planner.rules import Lookup, Rewrite, RuleContext, rewrite
from helium_proxy.planner.schedule import solve
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.planner.trie import Count, Profile, TemplatedRadixTree, build_trie, count_chars

ANY = "any"
"""The worker that is planned for while none is known."""


@dataclass(frozen=True, slots=True)
class Planning:
    """What planning asks of the world."""

    settings: PlanSettings = field(default_factory=PlanSettings)
    workers: Sequence[PlanWorker] = ()
    count: Count = count_chars
    profile: Profile | None = None
    lookup: Lookup | None = None


@dataclass(frozen=True)
class PhysicalPlan:
    """A plan ready to run: what is left to compute after the rewrites, where, and in which order."""

    submitted: int
    """Operators before the rewrites."""
    graph: OperatorGraph
    rewrites: tuple[Rewrite, ...]
    tree: TemplatedRadixTree
    workers: tuple[PlanWorker, ...]
    problem: Problem
    solution: Solution
    ids: tuple[int, ...]
    """Operator behind each number of `problem` and `solution`."""
    planning_s: float

    @cached_property
    def rank(self) -> dict[int, int]:
        """Operator → its place in the order of starts, from 0."""
        begin = self.solution.begin
        place = {j: i for i, j in enumerate(self.solution.order)}
        order = sorted(range(len(self.ids)), key=lambda j: (begin[j], place[j]))
        return {self.ids[j]: rank for rank, j in enumerate(order)}

    @cached_property
    def placement(self) -> dict[int, int]:
        """Operator → index into `workers`."""
        return {id_: self.solution.worker[j] for j, id_ in enumerate(self.ids)}

    @cached_property
    def number(self) -> dict[int, int]:
        """Operator → its number in `problem` and `solution`."""
        return {id_: j for j, id_ in enumerate(self.ids)}

    @cached_property
    def forecast(self) -> Forecast:
        """The schedule in seconds and tokens actually computed."""
        deps = {id_: self.graph.operators[id_].deps for id_ in self.ids}
        return forecast(self.tree, self.workers, self.rank, self.placement, deps)

    @cached_property
    def unserved(self) -> dict[str, int]:
        """Models that none of `workers` serves → operators that ask for them."""
        models = Counter(self.graph.operators[id_].template.model for id_ in self.ids)
        served = {model for model in models if any(worker.serves(model) for worker in self.workers)}
        return {model: count for model, count in models.items() if model not in served}

    def __repr__(self) -> str:
        return (
            f"<PhysicalPlan {self.graph.workflow!r}: {len(self.ids)} of {self.submitted} operators on "
            f"{len(self.workers)} workers, {self.solution.makespan:.0f} steps>"
        )


def optimize(graph: OperatorGraph, planning: Planning) -> PhysicalPlan:
    """Rewrite an expanded graph and schedule what is left of it."""
    began = time.perf_counter()
    settings, submitted = planning.settings, len(graph.operators)
    graph, rewrites = rewrite(graph, RuleContext(planning.lookup), settings)
    tree = build_trie(graph, planning.count, default_output=settings.default_output_tokens, profile=planning.profile)
    workers = tuple(planning.workers) or (PlanWorker(ANY, kv_tokens=settings.default_kv_tokens),)
    operators = graph.operators.values()
    problem, ids = make_problem(
        tree,
        {operator.id: operator.deps for operator in operators},
        {operator.id: operator.template.model for operator in operators},
        workers,
        {operator.id: operator.row for operator in operators},
    )
    solution = solve(problem, settings.effort)
    spent = time.perf_counter() - began
    return PhysicalPlan(submitted, graph, rewrites, tree, workers, problem, solution, tuple(ids), spent)


def make_physical(plan: Plan, planning: Planning) -> PhysicalPlan:
    """All of planning for a checked plan. Raises `InvalidRequest` when its prompts would be too large.

    >>> from helium_proxy.planner.plan import parse_plan
    >>> make_physical(parse_plan({"model": "m", "nodes": [{"id": "a", "prompt": "x"}]}), Planning())
    <PhysicalPlan 'workflow': 1 of 1 operators on 1 workers, 1 steps>
    """
    return optimize(expand(plan, planning.settings), planning)
