"""Tags: where they are read from, which source wins, what is refused, and how they are removed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helium_proxy.errors import InvalidRequest
from helium_proxy.workflow import WorkflowSettings, strip_headers, strip_tags, tags

from .driver import Driver, user

LENIENT = WorkflowSettings()
STRICT = WorkflowSettings(strict=True)


def test_body_wins_field_by_field_and_sources_are_kept() -> None:
    body = {"helium": {"workflow": "w", "node": "n"}, "metadata": {"helium.run": "r-meta", "helium.node": "other"}}
    headers = {
        "x-helium-run": "r-header",
        "x-helium-parents": "a, b",
        "baggage": "helium.priority=3;x=y, user=1, helium.parents=zz",
        "helicone-session-id": "h",
        "helicone-session-name": "native",
    }
    read = tags.read(body, headers, LENIENT)
    assert (read.workflow, read.run, read.node) == ("w", "r-meta", "n")
    assert read.parents == ("a", "b")
    assert read.priority == 3
    assert read.sources == {
        "workflow": "body",
        "node": "body",
        "run": "body",
        "parents": "header",
        "priority": "baggage",
    }
    assert sorted(read.conflicts) == ["node", "parents", "run"]


def test_equal_values_from_two_sources_are_no_conflict() -> None:
    read = tags.read({"helium": {"run": "r"}}, {"x-helium-run": "r"}, STRICT)
    assert read.conflicts == ()


def test_headers_alone() -> None:
    headers = {
        "x-helium-workflow": "trading",
        "x-helium-run": "7",
        "x-helium-node": "bull",
        "x-helium-parents": "",
        "x-helium-final": "true",
        "x-helium-deadline-ms": "1500",
        "x-helium-priority": "-2",
    }
    read = tags.read({}, headers, STRICT)
    assert (read.workflow, read.run, read.node, read.parents) == ("trading", "7", "bull", ())
    assert (read.final, read.deadline_s, read.priority) == (True, 1.5, -2)


def test_baggage_is_percent_decoded() -> None:
    assert tags.read({}, {"baggage": "helium.workflow=my%20flow"}, STRICT).workflow == "my flow"


def test_agentic_context_and_agent_hints() -> None:
    context = {
        "program_id": "p",
        "agent_id": "a",
        "parent_program_id": "q",
        "priority": 4,
        "expected_output_length": 90,
    }
    read = tags.read({"vllm_xargs": {"agentic_context": json.dumps(context)}}, {}, STRICT)
    assert (read.run, read.node, read.spawned_by, read.priority, read.output_tokens) == ("p", "a", "q", 4, 90.0)
    read = tags.read({"nvext": {"agent_hints": {"osl": 256, "priority": 1}}}, {}, STRICT)
    assert (read.output_tokens, read.priority) == (256.0, 1)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"run": "x" * 129}, "helium.run"),
    ({"node": "a\nb"}, "helium.node"),
    ({"workflow": ["w"]}, "helium.workflow"),
    ({"parents": [f"p{at}" for at in range(10_000)]}, "helium.parents"),
    ({"parents": {"a": 1}}, "helium.parents"),
    ({"parents": ["ok", "bad\x00"]}, "helium.parents"),
    ({"final": "perhaps"}, "helium.final"),
    ({"deadline_ms": -5}, "helium.deadline_ms"),
    ({"deadline_ms": "soon"}, "helium.deadline_ms"),
    ({"deadline_ms": float("nan")}, "helium.deadline_ms"),
    ({"priority": 1.5}, "helium.priority"),
    ({"priority": 2**40}, "helium.priority"),
    ({"priority": True}, "helium.priority"),
]


@pytest.mark.parametrize(("bad", "field"), BAD, ids=lambda value: str(value)[:40])
def test_bad_tags_are_refused_when_strict_and_ignored_otherwise(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tags.read({"helium": bad}, {}, STRICT)
    assert caught.value.param == field
    assert caught.value.status == 400
    read = tags.read({"helium": bad, "metadata": {"helium.run": "kept"}}, {}, LENIENT)
    assert read.ignored == (field.removeprefix("helium."),)
    assert read.run == "kept"


def test_members_that_are_no_tags_are_noticed() -> None:
    with pytest.raises(InvalidRequest, match=r"helium\.wrkflow: no such tag; did you mean workflow\?"):
        tags.read({"helium": {"run": "r", "wrkflow": "w"}}, {}, STRICT)
    read = tags.read({"helium": {"run": "r", "wrkflow": "w", "x": 1}}, {}, LENIENT)
    assert (read.run, read.ignored) == ("r", ("unknown",))


def test_not_an_object() -> None:
    with pytest.raises(InvalidRequest, match="object"):
        tags.read({"helium": "trading"}, {}, STRICT)
    assert tags.read({"helium": "trading"}, {}, LENIENT).ignored == ("helium",)


def test_conflicts_are_refused_when_strict() -> None:
    with pytest.raises(InvalidRequest, match="body and header disagree"):
        tags.read({"helium": {"run": "a"}}, {"x-helium-run": "b"}, STRICT)


def test_strict_reaches_the_caller_of_arrive_and_lenient_is_counted() -> None:
    with pytest.raises(InvalidRequest):
        Driver(STRICT).arrive([user("x")], run="a\x00")
    driver = Driver()
    driver.arrive([user("x")], run="a\x00")
    driver.arrive([user("x")], headers={"x-helium-run": "b"}, run="a")
    statistics = driver.workflows.statistics()
    assert (statistics.tags_ignored, statistics.tag_conflicts, statistics.failures) == (1, 1, 0)
    assert statistics.ignored_by_field == statistics.conflicts_by_field == {"run": 1}


def test_strip_removes_ours_and_nothing_else() -> None:
    body = {
        "model": "m",
        "helium": {"run": "r"},
        "metadata": {"helium.node": "n", "user": "u"},
        "kv_transfer_params": {"helium": {"pin": "x"}, "do_remote_decode": True},
        "vllm_xargs": {"agentic_context": "{}"},
        "nvext": {"agent_hints": {}},
    }
    kept, changed = strip_tags(body)
    assert changed
    assert kept == {
        "model": "m",
        "metadata": {"user": "u"},
        "kv_transfer_params": {"do_remote_decode": True},
        "vllm_xargs": {"agentic_context": "{}"},
        "nvext": {"agent_hints": {}},
    }
    assert "helium" in body, "the client's body is not changed"


def test_strip_drops_containers_that_held_nothing_else() -> None:
    kept, _ = strip_tags({"a": 1, "metadata": {"helium.run": "r"}, "kv_transfer_params": {"helium": {}}})
    assert kept == {"a": 1}


def test_strip_returns_the_same_object_when_there_is_nothing_to_remove() -> None:
    body = {"model": "m", "metadata": {"user": "u"}, "kv_transfer_params": {}}
    kept, changed = strip_tags(body)
    assert kept is body
    assert not changed


def test_strip_headers() -> None:
    headers = {"x-helium-run": "r", "baggage": "helium.node=n,user=1", "x-request-id": "q", "x-session-id": "s"}
    assert strip_headers(headers) == {"baggage": "user=1", "x-request-id": "q", "x-session-id": "s"}
    assert strip_headers({"baggage": "helium.node=n"}) == {}


def test_a_lone_surrogate_is_no_name() -> None:
    """Nothing could encode it: neither the answer that lists it nor the store."""
    read = tags.read({"helium": {"run": "\ud800", "workflow": "w\udfff", "node": "fine"}}, {}, WorkflowSettings())
    assert (read.run, read.workflow, read.node) == (None, None, "fine")
    assert set(read.ignored) == {"run", "workflow"}
