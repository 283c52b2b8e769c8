"""Operator pruning: drop what no output depends on."""

from __future__ import annotations

from helium_proxy.planner.graph import OperatorGraph
from helium_proxy.planner.rules.context import RuleContext


def prune(graph: OperatorGraph, context: RuleContext) -> OperatorGraph:
    """Walk backwards from the outputs and keep what is reached. O(operators + edges).

    >>> from helium_proxy.planner.graph import expand
    >>> from helium_proxy.planner.plan import parse_plan
    >>> from helium_proxy.planner.settings import PlanSettings
    >>> plan = parse_plan({"model": "m", "outputs": ["b"], "nodes": [
    ...     {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "{{nodes.a}}"}, {"id": "c", "prompt": "{{nodes.b}}"}]})
    >>> prune(expand(plan, PlanSettings()), RuleContext()).lines()
    ['a[0]', 'b[0] <- a[0]', 'output b[0]: b[0]']
    """
    reached: set[int] = set()
    stack = [id_ for outputs in graph.outputs for id_ in outputs.values()]
    while stack:
        id_ = stack.pop()
        if id_ not in reached:
            reached.add(id_)
            stack.extend(graph.operators[id_].deps)
    return graph.restricted(operator for id_, operator in graph.operators.items() if id_ in reached)
