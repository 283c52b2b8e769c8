"""The wire format: what is refused, and how the refusal reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from helium_proxy.errors import InvalidRequest
from helium_proxy.planner.graph import expand, request_body
from helium_proxy.planner.plan import load_plan, parse_plan
from helium_proxy.planner.settings import PlanSettings

A = {"id": "a", "prompt": "x"}


def plan_of(*nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "nodes": list(nodes), **fields}


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        ([], None, "JSON object"),
        ({}, "nodes", "required"),
        ({"nodes": {}}, "nodes", "must be a list"),
        (plan_of(), "nodes", "at least 1"),
        (plan_of(A, inputs=[]), "inputs", "at least 1"),
        (plan_of(A, inputs=[3]), "inputs[0]", "dictionary"),
        (plan_of(A, inputs=[{"q": [1]}]), "inputs[0].q.str", "string"),
        (plan_of(A, colour="red"), "colour", "not permitted"),
        (plan_of({**A, "colour": "red"}), "nodes[0].colour", "not permitted"),
        ({"nodes": [A]}, "nodes[0].model", "no model"),
        (plan_of({"id": "a b", "prompt": "x"}), "nodes[0].id", "pattern"),
        (plan_of({"id": "a#2", "prompt": "x"}), "nodes[0].id", "pattern"),
        (plan_of({"id": "a"}), "nodes[0]", "either"),
        (plan_of({**A, "messages": [{"role": "user", "content": "x"}]}), "nodes[0]", "either"),
        (plan_of({"id": "a", "messages": []}), "nodes[0].messages", "at least 1"),
        (plan_of({"id": "a", "messages": [{"content": "x"}]}), "nodes[0].messages[0].role", "required"),
        (plan_of(A, A), "nodes[1].id", "defined twice"),
        (plan_of({"id": "a", "prompt": "{{nodes.b}}"}), "nodes[0].prompt", "unknown node 'b'"),
        (plan_of({"id": "a", "prompt": "{{nodes.}}"}), "nodes[0].prompt", "malformed"),
        (plan_of({"id": "a", "prompt": "{{inputs.a b}}"}), "nodes[0].prompt", "malformed"),
        (plan_of({"id": "a", "prompt": "{{inputs.q}}"}), "inputs[0].q", "does not have"),
        (plan_of({"id": "a", "prompt": "{{inputs.q}}"}, inputs=[{"q": "1"}, {}]), "inputs[1].q", "does not have"),
        (plan_of(A, outputs=["b"]), "outputs[0]", "unknown output"),
        (plan_of({"id": "a", "prompt": "{{nodes.a}}"}), "nodes", "cycle: a -> a"),
        (plan_of({"id": "a", "prompt": "{{nodes.b}}"}, {"id": "b", "prompt": "{{nodes.a}}"}), "nodes", "cycle"),
        (plan_of({**A, "params": {"n": 2}}), "nodes[0].params", "one output"),
        (plan_of({**A, "params": {"stream": True}}), "nodes[0].params", "'stream'"),
        (plan_of({**A, "params": {"messages": []}}), "nodes[0].params", "'messages'"),
        (plan_of({**A, "params": {"max_tokens": 0}}), "nodes[0].params", "positive"),
        (plan_of({**A, "params": {"max_tokens": "9"}}), "nodes[0].params", "positive"),
        (plan_of({**A, "params": {"temperature": 3}}), "nodes[0].params", "0 to 2"),
        (plan_of({**A, "params": {"temperature": True}}), "nodes[0].params", "0 to 2"),
        (plan_of(A, params={"temperature": -1}), "params", "0 to 2"),
    ],
)
def test_refused(raw: Any, param: str | None, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_plan(raw)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert says in caught.value.message


def test_a_long_cycle_is_shown_shortened() -> None:
    nodes = [{"id": f"n{i}", "prompt": f"{{{{nodes.n{(i + 1) % 50}}}}}"} for i in range(50)]
    with pytest.raises(InvalidRequest, match=r"cycle: n\d+ -> .* … ") as caught:
        parse_plan(plan_of(*nodes))
    assert len(caught.value.message) < 200


def _many_messages() -> dict[str, Any]:
    return plan_of({"id": "a", "messages": [{"role": "user", "content": "x"}] * 1_000_000})


def _many_parts() -> dict[str, Any]:
    content = [{"type": "text", "text": "x"}] * 1_000_000
    return plan_of({"id": "a", "messages": [{"role": "user", "content": content}]})


def _many_placeholders() -> dict[str, Any]:
    return plan_of({"id": "a", "prompt": "{{inputs.q}}" * 1_000}, inputs=[{"q": "x"}] * 10_000)


def _much_text() -> dict[str, Any]:
    return plan_of({"id": "a", "prompt": "{{inputs.q}}" * 1_000}, inputs=[{"q": "x" * 1_000_000}])


def _much_text_in_all() -> dict[str, Any]:
    return plan_of({"id": "a", "prompt": "{{inputs.q}}"}, inputs=[{"q": "x" * 1_000_000}] * 1_000)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plan_of(*[A] * 1_000_000), "1,000,000 nodes"),
        (lambda: plan_of(A, inputs=[{}] * 1_000_000), "1,000,000 inputs"),
        (lambda: plan_of(*[A] * 1_000, inputs=[{}] * 1_000), "1,000,000 operators"),
        (_many_messages, "1,000,000 messages"),
        (_many_parts, "1,000,000 messages"),
        (_many_placeholders, "10,000,000"),
        (_much_text, "prompt of node 'a'"),
        (_much_text_in_all, "all prompts together"),
    ],
)
def test_huge_plans_are_refused_at_once(make: Any, says: str) -> None:
    raw = make()
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=says):
        expand(parse_plan(raw), PlanSettings())
    assert time.process_time() - began < 0.5


def test_values_are_never_expanded_again() -> None:
    raw = plan_of(
        {"id": "a", "prompt": "{{inputs.q}}"},
        {"id": "b", "messages": [{"role": "user", "content": "{{ nodes.a }} and {{inputs.q}} {{other}}"}]},
        inputs=[{"q": "{{inputs.secret}} {{nodes.a}}", "secret": "s"}],
    )
    graph = expand(parse_plan(raw), PlanSettings())
    a, b = graph.operators.values()
    assert request_body(a, {})["prompt"] == "{{inputs.secret}} {{nodes.a}}"
    assert request_body(b, {a.id: "{{inputs.q}}"})["messages"] == [
        {"role": "user", "content": "{{inputs.q}} and {{inputs.secret}} {{nodes.a}} {{other}}"}
    ]
    assert b.deps == (a.id,)


def test_bodies_keep_what_is_not_text() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,x"}}
    raw = plan_of(
        {
            "id": "a",
            "messages": [
                {"role": "system", "content": "s", "name": "n"},
                {"role": "assistant", "tool_calls": [{"id": "t", "function": {"name": "{{inputs.q}}"}}]},
                {"role": "user", "content": [image, {"type": "text", "text": "{{inputs.q}}!"}]},
            ],
            "params": {"max_tokens": 5, "seed": 1},
            "model": "other",
        },
        params={"max_tokens": 9, "temperature": 0},
        inputs=[{"q": 3, "unused": True}],
    )
    (operator,) = expand(parse_plan(raw), PlanSettings()).operators.values()
    assert request_body(operator, {}) == {
        "model": "other",
        "messages": [
            {"role": "system", "content": "s", "name": "n"},
            {"role": "assistant", "tool_calls": [{"id": "t", "function": {"name": "{{inputs.q}}"}}]},
            {"role": "user", "content": [image, {"type": "text", "text": "3!"}]},
        ],
        "max_tokens": 5,
        "seed": 1,
        "temperature": 0,
    }
    assert operator.template.deterministic


@pytest.mark.parametrize(
    ("params", "deterministic"),
    [({}, False), ({"temperature": None}, False), ({"temperature": 0}, True), ({"temperature": 0.0, "n": 1}, True)],
)
def test_deterministic_means_temperature_zero_said_aloud(params: dict[str, Any], deterministic: bool) -> None:
    (operator,) = expand(parse_plan(plan_of({**A, "params": params})), PlanSettings()).operators.values()
    assert operator.template.deterministic is deterministic


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "node",
    [
        {**A, "params": {"stop": _nested(900)}},
        {"id": "a", "messages": [{"role": "user", "content": "x", "tool_calls": _nested(900)}]},
        {"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": _nested(900)}]}]},
    ],
)
def test_deep_nesting_is_the_clients_error(node: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        expand(parse_plan(plan_of(node)), PlanSettings())


def test_load_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("model: m\nnodes: [{id: a, prompt: 'x {{inputs.q}}'}]\ninputs: [{q: 1}]\n", encoding="utf-8")
    assert repr(load_plan(path).spec) == "<PlanSpec 'workflow': 1 nodes, 1 inputs>"
    path.write_text("nodes: [", encoding="utf-8")
    with pytest.raises(InvalidRequest, match=r"plan\.yaml"):
        load_plan(path)


def test_a_date_in_a_plan_file_is_the_text_that_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "model: m\nnodes: [{id: a, prompt: x}]\ninputs: [{d: 2024-01-01, at: 2024-01-01 12:00:00, n: 3, b: true}]\n"
    )
    assert load_plan(path).spec.inputs == [{"d": "2024-01-01", "at": "2024-01-01 12:00:00", "n": 3, "b": True}]


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "nodes: !!set {a}\n", "nodes: .inf\n", "[" * 5_000])
def test_a_file_that_holds_no_plan(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"^plan\.yaml: "):
        load_plan(path)


def test_json_may_be_indented_by_tabs(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text('{\n\t"model": "demo",\n\t"nodes": [{"id": "a", "prompt": "x"}]\n}')
    assert [node.id for node in load_plan(file).spec.nodes] == ["a"]
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match=r"plan\.json"):
        load_plan(file)
