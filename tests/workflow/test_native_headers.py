"""Session headers of known clients, as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helium_proxy.workflow import WorkflowSettings, native_headers, tags

from .driver import Driver, user

RECORDED = json.loads((Path(__file__).parent / "fixtures/native/requests.json").read_text())


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['client']}-{len(case['headers'])}")
def test_recorded_requests(case: dict[str, Any]) -> None:
    session = native_headers.read(case["headers"])
    if case["client"] is None:
        assert session is None
        return
    assert session is not None
    assert session.client == case["client"]
    for name in ("session", "parent_session", "agent", "parent_agent", "workflow", "node"):
        assert getattr(session, name) == case["expect"].get(name), name
    assert session.final == case["expect"].get("final", False)


def test_every_row_has_a_recording() -> None:
    recorded = {name for case in RECORDED for name in case["headers"]}
    missing = {row.session for row in native_headers.TABLE} - recorded
    assert missing <= {"session_id"}  # Codex's older spelling of session-id


def test_sessions_name_runs_and_never_data_edges() -> None:
    driver = Driver()
    headers = {"x-litellm-session-id": "s1"}
    one = driver.call([user("alpha")], "first", headers=headers)
    two = driver.call([user("beta")], "second", headers=headers)
    other = driver.call([user("gamma")], "third", headers={"x-litellm-session-id": "s2"})
    assert one.run == two.run == "s1"
    assert other.run == "s2"
    assert driver.edges("s1") == set()


def test_a_subagent_is_spawned_by_its_parent_agents_latest_call() -> None:
    driver = Driver()
    session = {"x-claude-code-session-id": "c1"}
    driver.call([user("plan")], "a", headers=session)
    latest = driver.call([user("delegate")], "b", headers=session)
    child = driver.call([user("do it")], "c", headers={**session, "x-claude-code-agent-id": "sub"})
    driver.call([user("do more")], "d", headers={**session, "x-claude-code-agent-id": "sub"})
    run = driver.workflows.run("c1")
    assert run is not None
    assert run["edges"] == [{"from": latest.call, "to": child.call, "kind": "spawn", "source": "native"}]


def test_a_child_session_joins_its_parents_run() -> None:
    driver = Driver()
    parent = driver.call([user("plan")], "a", headers={"x-session-id": "s1"})
    child = driver.call([user("x")], "b", headers={"x-session-id": "s2", "x-parent-session-id": "s1"})
    again = driver.call([user("y")], "c", headers={"x-session-id": "s2", "x-parent-session-id": "s1"})
    assert parent.run == child.run == again.run
    assert driver.edges("s1") == {(parent.call, child.call)}


def test_final_session_ends_the_run() -> None:
    driver = Driver()
    driver.call([user("a")], "x", headers={"x-dynamo-session-id": "d"})
    driver.call([user("b")], "y", headers={"x-dynamo-session-id": "d", "x-dynamo-session-final": "true"})
    assert [end.reason for end in driver.workflows.tick(driver.now)] == ["final"]


def test_traceparent_groups() -> None:
    driver = Driver()
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    assert driver.call([user("a")], headers=trace).run == driver.call([user("b")], headers=trace).run


def test_switched_off() -> None:
    read = tags.read({}, {"x-session-id": "s"}, WorkflowSettings(native_headers=False))
    assert read.session is None


def test_a_hostile_session_id_is_ignored() -> None:
    read = tags.read({}, {"x-session-id": "s" * 1_000}, WorkflowSettings())
    assert read.session is None
    assert read.ignored == ("session",)
