"""Common subgraph elimination: merge operators of equal signature."""

from __future__ import annotations

from dataclasses import replace

from helium_proxy.planner.graph import OperatorGraph, classes
from helium_proxy.planner.rules.context import RuleContext


def cse(graph: OperatorGraph, context: RuleContext) -> OperatorGraph:
    """Keep the first of the deterministic operators (temperature 0, n 1) whose kind, model, parameters and inputs are
    equal; the others' consumers take its output. Producers come first, so whole subgraphs merge bottom-up.

    >>> from helium_proxy.planner.graph import expand
    >>> from helium_proxy.planner.plan import parse_plan
    >>> from helium_proxy.planner.settings import PlanSettings
    >>> plan = parse_plan({"model": "m", "params": {"temperature": 0}, "nodes": [
    ...     {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "c", "prompt": "{{nodes.a}}{{nodes.b}}"}]})
    >>> cse(expand(plan, PlanSettings()), RuleContext()).lines()
    ['a[0]', 'c[0] <- a[0]', 'output c[0]: c[0]']
    """
    kept = classes(graph)
    operators = {}
    for id_, operator in graph.operators.items():
        if kept[id_] != id_:
            continue
        bindings = {name: kept[dep] for name, dep in operator.bindings.items()}
        operators[id_] = operator if bindings == operator.bindings else replace(operator, bindings=bindings)
    outputs = tuple({node: kept[id_] for node, id_ in row.items()} for row in graph.outputs)
    return replace(graph, operators=operators, outputs=outputs)
