"""Each rewrite rule against its fixture file, and what all of them promise."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from helium_proxy.planner.graph import expand
from helium_proxy.planner.plan import parse_plan
from helium_proxy.planner.rules import RULES, RuleContext, rewrite
from helium_proxy.planner.settings import PlanSettings

FIXTURES = Path(__file__).parent / "fixtures"
BY_NAME = {rule.__name__: rule for rule in RULES}
CASES = [
    pytest.param(name, case, id=f"{name}-{case['name']}")
    for name in BY_NAME
    for case in yaml.safe_load((FIXTURES / f"{name}.yaml").read_text(encoding="utf-8"))
]


def context(cache: dict[str, str] | None) -> RuleContext:
    return RuleContext(lambda body: (cache or {}).get(body["prompt"]))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_rule_against_fixture(name: str, case: dict[str, Any]) -> None:
    before = expand(parse_plan(case["plan"]), PlanSettings())
    shown = before.lines()
    after = BY_NAME[name](before, context(case.get("cache")))
    assert after.lines() == case["expect"]
    assert before.lines() == shown, "a rule changes nothing in place"
    assert list(after.operators) == sorted(after.operators)
    assert all(dep in after.operators and dep < o.id for o in after.operators.values() for dep in o.deps)
    assert BY_NAME[name](after, context(case.get("cache"))).lines() == case["expect"], "a rule is done after one pass"


def test_every_rule_has_a_file_a_fixture_file_and_a_doctest() -> None:
    for name in BY_NAME:
        module = importlib.import_module(f"helium_proxy.planner.rules.{name}")
        assert (FIXTURES / f"{name}.yaml").exists()
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


def test_rewrite_reports_what_each_rule_did_and_leaves_out_what_is_off() -> None:
    raw = {
        "model": "m",
        "params": {"temperature": 0},
        "outputs": ["c"],
        "nodes": [
            {"id": "a", "prompt": "x"},
            {"id": "b", "prompt": "x"},
            {"id": "c", "prompt": "{{nodes.a}}{{nodes.b}}"},
            {"id": "d", "prompt": "unused"},
        ],
    }
    graph = expand(parse_plan(raw), PlanSettings())
    _, done = rewrite(graph, context({"x": "A"}), PlanSettings())
    assert [(r.rule, r.dropped, r.fetched, dict(r.nodes)) for r in done] == [
        ("prune", 1, 0, {"d": 1}),
        ("cse", 1, 0, {"b": 1}),
        ("cache_fetch", 0, 1, {"a": 1}),
    ]
    same, done = rewrite(graph, context({"x": "A"}), PlanSettings(prune=False, cse=False, cache_fetch=False))
    assert same is graph
    assert done == ()


def test_doctests_of_the_planner() -> None:
    for name in ("plan", "graph", "trie", "cost", "pipeline", "build"):
        found = doctest.testmod(importlib.import_module(f"helium_proxy.planner.{name}"))
        assert found.attempted > 0, name
        assert found.failed == 0, name
