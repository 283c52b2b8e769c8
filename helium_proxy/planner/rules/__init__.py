"""The logical rewrites (arXiv 2603.16104, query plan optimization): a tuple of functions, one file each, in order.

A rule takes a graph and returns one with the same outputs; it changes nothing in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from helium_proxy.planner.graph import OperatorGraph
from helium_proxy.planner.rules.cache_fetch import cache_fetch
from helium_proxy.planner.rules.context import Lookup, RuleContext
from helium_proxy.planner.rules.cse import cse
from helium_proxy.planner.rules.prune import prune
from helium_proxy.planner.settings import PlanSettings

Rule = Callable[[OperatorGraph, RuleContext], OperatorGraph]

RULES: tuple[Rule, ...] = (prune, cse, cache_fetch)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What one rule did, in operators and by workflow node."""

    rule: str
    dropped: int
    fetched: int
    nodes: Mapping[str, int]
    """Node → operators of it that were dropped or fetched."""


def _by_node(before: OperatorGraph, after: OperatorGraph) -> dict[str, int]:
    changed: dict[str, int] = {}
    for id_, operator in before.operators.items():
        now = after.operators.get(id_)
        if now is None or (now.fetched is not None and operator.fetched is None):
            changed[operator.template.node] = changed.get(operator.template.node, 0) + 1
    return changed


def rewrite(
    graph: OperatorGraph, context: RuleContext, settings: PlanSettings
) -> tuple[OperatorGraph, tuple[Rewrite, ...]]:
    """Apply every rule that `settings` leaves on."""
    done: list[Rewrite] = []
    for rule in RULES:
        if not getattr(settings, rule.__name__):
            continue
        before, graph = graph, rule(graph, context)
        dropped = len(before.operators) - len(graph.operators)
        fetched = sum(operator.fetched is not None for operator in graph.operators.values())
        done.append(Rewrite(rule.__name__, dropped, fetched, _by_node(before, graph)))
    return graph, tuple(done)


__all__ = ["RULES", "Lookup", "Rewrite", "Rule", "RuleContext", "cache_fetch", "cse", "prune", "rewrite"]
