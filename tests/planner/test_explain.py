"""EXPLAIN: what the text says, and that the JSON says the same."""

from __future__ import annotations

import json
from dataclasses import replace

import orjson

from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.explain import Actual, explain_json, explain_text
from helium_proxy.planner.pipeline import PhysicalPlan, Planning, make_physical
from helium_proxy.planner.plan import parse_plan

RAW = {
    "workflow": "review",
    "model": "demo",
    "params": {"temperature": 0, "max_tokens": 10},
    "outputs": ["sum"],
    "nodes": [
        {
            "id": f"critic_{i}",
            "messages": [
                {"role": "system", "content": f"You are critic {i}. " + "Be kind. " * 20},
                {"role": "user", "content": "{{inputs.text}}"},
            ],
        }
        for i in range(2)
    ]
    + [
        {"id": "unused", "prompt": "x"},
        {"id": "sum", "messages": [{"role": "user", "content": "{{nodes.critic_0}}{{nodes.critic_1}}"}]},
    ],
    "inputs": [{"text": "one"}, {"text": "two"}, {"text": "one"}],
}

TEXT = """\
Workflow review: 12 operators over 3 inputs, 5 to compute (planned in 0 ms)
Rewrites
  prune        3 dropped  (unused x3)
  cse          3 dropped  (critic_0 x1, critic_1 x1, sum x1)
  cache_fetch  1 fetched, 0 dropped  (critic_0 x1)
Prefix tree (tokens, operators below)
      0 x5    model demo
        8 x3    <system>You are critic
         50 x2    1. Be kind. Be kind. Be kind. Be kind. B … ind. Be kind. <user>
            5 x1    one<assistant>
             10 x1    -> critic_1[0]
            5 x1    two<assistant>
             10 x1    -> critic_1[1]
         55 x1    0. Be kind. Be kind. Be kind. Be kind. B … <user>two<assistant>
           10 x1    -> critic_0[1]
        4 x2    <user>
         15 x1    {critic_0[0]}{critic_1[0]}<assistant>
           10 x1    -> sum[0]
         24 x1    {critic_0[1]}{critic_1[1]}<assistant>
           10 x1    -> sum[1]
"""


def plan() -> PhysicalPlan:
    def lookup(body: dict[str, object]) -> str | None:
        return "fine" if "critic 0" in str(body) and "one" in str(body) else None

    workers = [PlanWorker("w0", kv_tokens=500), PlanWorker("w1", kv_tokens=500)]
    return replace(make_physical(parse_plan(RAW), Planning(workers=workers, lookup=lookup)), planning_s=0.0)


def test_text() -> None:
    text = explain_text(plan())
    assert text.startswith(TEXT)
    predicted, *workers = text[len(TEXT) :].splitlines()
    assert predicted.startswith("Predicted: ")
    assert "178 of 236 prompt tokens computed (fewest possible 166)" in predicted
    assert [line.split(":")[0] for line in workers if line.startswith("Worker")] == ["Worker w0", "Worker w1"]
    shown = [line.split()[1] for line in workers if line.split()[0].isdigit()]
    assert sorted(shown) == ["critic_0[1]", "critic_1[0]", "critic_1[1]", "sum[0]", "sum[1]"]


def test_json_agrees_with_the_plan() -> None:
    made = plan()
    found = json.loads(json.dumps(explain_json(made)))
    assert (found["operators_submitted"], found["operators_planned"], found["inputs"]) == (12, 5, 3)
    assert [rewrite["rule"] for rewrite in found["rewrites"]] == ["prune", "cse", "cache_fetch"]
    assert found["predicted"]["makespan_steps"] == round(made.solution.makespan, 3)
    assert found["predicted"]["computed_tokens"] == sum(
        operator.get("predicted_computed_tokens", 0) for operator in found["operators"]
    )
    assert sum(worker["operators"] for worker in found["workers"]) == 5
    by_name = {operator["operator"]: operator for operator in found["operators"]}
    assert by_name["critic_0[0]"]["cache_fetch"]
    assert by_name["sum[1]"]["depends_on"] == ["critic_0[1]", "critic_1[1]"]
    assert by_name["sum[1]"]["begin"] >= by_name["critic_1[1]"]["complete"] + 10 - 1e-3
    orders = [operator["order"] for operator in found["operators"] if "order" in operator]
    assert sorted(orders) == list(range(5))
    (model,) = found["prefix_tree"]
    assert model["model"] == "demo"
    assert model["operators_below"] == 5
    assert model["children"][0]["children"][0]["operators_below"] == 2
    assert found["actual"] is None


def test_analyze_puts_actuals_beside_predictions() -> None:
    made = plan()
    ids = list(made.rank)
    actuals = {
        ids[0]: Actual("done", "computed", "w1", 60, 20, 9, 0.5, 1.5),
        ids[1]: Actual("done", "coalesced", "w1", 60, 20, 9, 0.5, 2.5),
        ids[2]: Actual("failed", started_s=0.5, finished_s=1.0, error="out\nof " + "order" * 100),
        ids[3]: Actual("skipped", error="out of order"),
        ids[4]: Actual("running", started_s=0.5),
    }
    text = explain_text(made, actuals)
    assert "Actual: 2.50 s, 40 of 120 prompt tokens computed, 18 output tokens; 2 done, 1 failed, 1 skipped" in text
    assert "(actual done 0.50-1.50 s, new=40 out=9 computed on w1)" in text
    assert "(actual done 0.50-2.50 s, new=0 out=9 coalesced on w1)" in text
    assert "(actual failed 0.50-1.00 s)" in text
    assert "(actual skipped)" in text
    assert "(actual running 0.50-… s)" in text
    name = made.graph.operators[ids[2]].name
    failed = text.splitlines().index("Failed")
    assert text.splitlines()[failed + 1].startswith(f"  {name}: out of order")
    assert text.splitlines()[failed + 1].endswith("…")
    assert text.splitlines()[failed + 2].startswith("Worker ")
    found = explain_json(made, actuals)
    assert found["actual"]["fate"] == {"computed": 1, "coalesced": 1}
    actual = next(o["actual"] for o in found["operators"] if "actual" in o and o["actual"]["fate"] == "computed")
    assert actual["computed_tokens"] == 40
    assert next(o["actual"]["error"] for o in found["operators"] if o.get("order") == 3) == "out of order"


def test_long_plans_are_cut() -> None:
    raw = {"model": "m", "nodes": [{"id": f"n{i}", "prompt": f"{i}"} for i in range(300)]}
    text = explain_text(make_physical(parse_plan(raw), Planning()), max_lines=20)
    assert len(text.splitlines()) < 60
    assert "… 280 more" in text


def test_a_tree_too_deep_for_json_is_cut() -> None:
    nodes = [{"id": f"n{i}", "prompt": "ab" * (i + 1)} for i in range(300)]
    raw = {"workflow": "deep", "model": "demo", "nodes": nodes, "outputs": ["n299", *(f"n{i}" for i in range(299))]}
    plan = make_physical(parse_plan(raw), Planning())
    text = orjson.dumps(explain_json(plan))
    assert b'"deeper":' in text


def test_a_model_that_no_worker_serves_is_warned_of() -> None:
    nodes = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y", "model": "large"}, {"id": "c", "prompt": "z"}]
    workers = [PlanWorker("w0", models=frozenset({"large"})), PlanWorker("w1", models=frozenset({"other"}))]
    made = make_physical(parse_plan({"model": "small", "nodes": nodes}), Planning(workers=workers))
    warning = "no worker that is up serves model 'small', which 2 operators will ask for"
    assert explain_json(made)["warnings"] == [warning]
    assert explain_text(made).splitlines()[1] == f"Warning: {warning}"
    anything = replace(made, workers=(*workers, PlanWorker("w2")))
    assert explain_json(anything)["warnings"] == []
    assert "Warning" not in explain_text(anything)
    nobody = make_physical(parse_plan({"model": "small", "nodes": nodes}), Planning())
    assert explain_json(nobody)["warnings"] == ["no worker is up: planned for one of usual speed"]


def test_many_failures_are_cut() -> None:
    raw = {"model": "m", "nodes": [{"id": f"n{i}", "prompt": f"{i}"} for i in range(30)]}
    made = make_physical(parse_plan(raw), Planning())
    text = explain_text(made, {id_: Actual("failed", error="no") for id_ in made.ids}, max_lines=20)
    assert text.count(": no\n") == 20
    assert ": no\n  … 10 more\n" in text


def test_one_of_a_thing_is_one() -> None:
    raw = {"model": "m", "params": {"max_tokens": 1}, "nodes": [{"id": "a", "prompt": "x"}]}
    made = make_physical(parse_plan(raw), Planning(workers=[PlanWorker("w0", kv_tokens=1)]))
    actuals = {made.ids[0]: Actual("done", "computed", "w0", 1, 0, 1, 0.0, 1.0)}
    text = explain_text(made, actuals, max_lines=1)
    assert text.startswith("Workflow workflow: 1 operator over 1 input, 1 to compute")
    assert "Worker w0: 1 operator, busy" in text
    assert " 1 output token; 1 done" in text
