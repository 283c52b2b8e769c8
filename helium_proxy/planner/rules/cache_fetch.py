"""Cache substitution: an operator whose answer is known becomes a CacheFetch."""

from __future__ import annotations

from dataclasses import replace

from helium_proxy.planner.graph import OperatorGraph, request_body
from helium_proxy.planner.rules.context import RuleContext
from helium_proxy.planner.rules.prune import prune


def cache_fetch(graph: OperatorGraph, context: RuleContext) -> OperatorGraph:
    """Look up every deterministic operator whose inputs are all known. A hit makes its consumers' inputs known, so
    substitution cascades; producers that only fetched operators consumed are dropped.

    >>> from helium_proxy.planner.graph import expand
    >>> from helium_proxy.planner.plan import parse_plan
    >>> from helium_proxy.planner.settings import PlanSettings
    >>> plan = parse_plan({"model": "m", "params": {"temperature": 0}, "nodes": [
    ...     {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "{{nodes.a}}!"}, {"id": "c", "prompt": "{{nodes.b}}"}]})
    >>> cache = {"x": "A", "A!": "B"}
    >>> cache_fetch(expand(plan, PlanSettings()), RuleContext(lambda body: cache.get(body["prompt"]))).lines()
    ["b[0] = 'B'", 'c[0] <- b[0]', 'output c[0]: c[0]']
    """
    if context.lookup is None:
        return graph
    known: dict[int, str] = {}
    operators = {}
    for id_, operator in graph.operators.items():
        operators[id_] = operator
        if (
            operator.fetched is None
            and operator.template.deterministic
            and all(dep in known for dep in operator.deps)
        ):
            text = context.lookup(request_body(operator, known))
            if text is not None:
                operators[id_] = replace(operator, fetched=text)
        if (fetched := operators[id_].fetched) is not None:
            known[id_] = fetched
    return prune(graph.restricted(operators.values()), context)
