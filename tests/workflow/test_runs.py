"""Runs: nodes and their repeats, named parents, placeholders, retries, ends, exports, bounds."""

from __future__ import annotations

import gc

import networkx as nx
import pytest

from helium_proxy.errors import InvalidRequest
from helium_proxy.workflow import WorkflowSettings, graph
from helium_proxy.workflow.graph import Run

from .driver import Driver, system, user


def names(driver: Driver, run: str) -> dict[str, str]:
    found = driver.workflows.run(run)
    assert found is not None
    return {node["call"]: node["node"] for node in found["nodes"]}


def test_repeats_are_numbered_in_order_of_arrival() -> None:
    driver = Driver()
    calls = [driver.call([user("x")], run="r", node="critic").node for _ in range(3)]
    assert calls == ["critic", "critic#2", "critic#3"]


def test_parents_by_name_response_id_and_occurrence() -> None:
    driver = Driver()
    a = driver.call([user("a")], run="r", node="a", parents=[])
    a2 = driver.call([user("a")], run="r", node="a", parents=[])
    by_id = driver.call([user("b")], run="r", node="b", parents=[a.call])
    by_occurrence = driver.call([user("c")], run="r", node="c", parents=["a#2"])
    assert driver.edges("r") == {(a.call, by_id.call), (a2.call, by_occurrence.call)}
    run = driver.workflows.run("r")
    assert run is not None
    assert {edge["source"] for edge in run["edges"]} == {"tag"}


def test_a_reply_id_that_differs_from_the_call_id_names_it_too() -> None:
    driver = Driver()
    a = driver.arrive([user("a")], run="r", node="a")
    driver.finish(a.call, "text", reply_id="resp_1")
    b = driver.call([user("b")], run="r", node="b", parents=["resp_1"])
    assert driver.edges("r") == {(a.call, b.call)}


def test_a_bare_name_in_a_loop_means_the_latest_turn() -> None:
    driver = Driver()
    w1 = driver.call([user("1")], run="r", node="writer", parents=[])
    c1 = driver.call([user("2")], run="r", node="critic", parents=["writer"])
    w2 = driver.call([user("3")], run="r", node="writer", parents=["critic"])
    c2 = driver.call([user("4")], run="r", node="critic", parents=["writer"])
    assert driver.edges("r") == {(w1.call, c1.call), (c1.call, w2.call), (w2.call, c2.call)}


def test_a_bare_name_after_a_fan_out_means_all_of_it() -> None:
    driver = Driver()
    experts = [driver.call([user(str(at))], run="r", node="expert", parents=[]) for at in range(5)]
    joined = driver.call([user("all")], run="r", node="summary", parents=["expert"])
    assert driver.edges("r") == {(expert.call, joined.call) for expert in experts}


def test_content_tells_which_branch_a_bare_name_means() -> None:
    driver = Driver()
    drafts = [
        driver.call(
            [user(str(at))], f"Draft {at} says something of its own about topic {at}.", run="r", node="trader"
        )
        for at in range(3)
    ]
    risk = driver.call(
        [user("Assess: Draft 1 says something of its own about topic 1.")], run="r", node="risk", parents=["trader"]
    )
    assert driver.edges("r") == {(drafts[1].call, risk.call)}


def test_empty_parents_make_a_root_whatever_the_content() -> None:
    driver = Driver()
    text = "A long and unmistakable sentence that nobody else would ever write like this."
    driver.call([user("a")], text, run="r", node="a")
    driver.call([user(text)], run="r", node="b", parents=[])
    assert driver.edges("r") == set()


def test_unknown_parents_wait_and_are_bounded() -> None:
    driver = Driver(WorkflowSettings(max_placeholders=2))
    child = driver.call([user("b")], run="r", node="b", parents=["a", "x", "one-too-many"])
    found = driver.workflows.run("r")
    assert found is not None
    assert found["waiting_for"] == ["a", "x"]
    assert driver.workflows.statistics().tags_ignored == 1
    parent = driver.call([user("a")], run="r", node="a", parents=[])
    assert driver.edges("r") == {(parent.call, child.call)}


def test_cycles_are_refused() -> None:
    driver = Driver()
    driver.call([user("1")], run="r", node="self", parents=["self"])
    b = driver.call([user("2")], run="r", node="b", parents=["a"])
    a = driver.call([user("3")], run="r", node="a", parents=["b"])
    assert driver.edges("r") == {(a.call, b.call)}, "what was named first stays"
    statistics = driver.workflows.statistics()
    assert statistics.failures == 0
    assert statistics.tags_ignored == 2


@pytest.mark.parametrize("second", [["self"], ["b"]])
def test_cycles_are_a_400_when_strict(second: list[str]) -> None:
    driver = Driver(WorkflowSettings(strict=True))
    driver.call([user("2")], run="r", node="b", parents=["self"])
    with pytest.raises(InvalidRequest) as caught:
        driver.arrive([user("1")], run="r", node="self", parents=second)
    assert caught.value.param == "helium.parents"
    found = driver.workflows.run("r")
    assert found is not None
    assert len(found["nodes"]) == 1, "a refused call leaves no trace"


def test_a_retry_attaches_to_its_call() -> None:
    driver = Driver()
    first = driver.arrive([user("x")], headers={"x-stainless-retry-count": "0"}, run="r", node="n")
    driver.finish(first.call, fate="error", status=503)
    again = driver.arrive([user("x")], headers={"x-stainless-retry-count": "1"}, run="r", node="n")
    assert again.retry
    assert (again.call, again.node) == (first.call, first.node)
    driver.finish(again.call, "text")
    run = driver.workflows.run("r")
    assert run is not None
    assert [(node["state"], node["retries"]) for node in run["nodes"]] == [("done", 1)]


def test_an_equal_body_without_a_retry_count_is_a_new_call() -> None:
    driver = Driver()
    headers = {"x-stainless-retry-count": "0"}
    one = driver.arrive([user("x")], headers=headers, run="r", node="n")
    two = driver.arrive([user("x")], headers=headers, run="r", node="n")
    other = driver.arrive([user("y")], headers={"x-stainless-retry-count": "1"}, run="r", node="n")
    assert not two.retry
    assert not other.retry
    assert len({one.call, two.call, other.call}) == 3


def test_a_run_ends_by_final_idle_or_api() -> None:
    driver = Driver(WorkflowSettings(run_idle_s=10))
    driver.call([user("x")], run="f", node="n", final=True)
    driver.call([user("x")], run="i", node="n")
    driver.call([user("x")], run="a", node="n")
    assert not driver.workflows.end_run("a", "other")
    assert driver.workflows.end_run("a", "t")
    assert not driver.workflows.end_run("a", "t")
    assert {(end.run, end.reason) for end in driver.workflows.tick(driver.now)} == {("f", "final"), ("a", "api")}
    ended = driver.workflows.tick(driver.now + 11)
    assert [(end.run, end.reason, end.calls) for end in ended] == [("i", "idle", 1)]


def test_a_run_in_flight_is_not_idle() -> None:
    driver = Driver(WorkflowSettings(run_idle_s=10))
    call = driver.arrive([user("x")], run="r", node="n")
    assert driver.workflows.tick(driver.now + 50) == []
    assert driver.workflows.tick(driver.now + 500), "a call whose end is never told does not keep a run for ever"
    driver.finish(call.call, "late")


def test_a_final_call_waits_for_calls_still_in_flight() -> None:
    driver = Driver()
    other = driver.arrive([user("x")], run="r", node="slow")
    driver.call([user("y")], run="r", node="last", final=True)
    assert driver.workflows.tick(driver.now) == []
    driver.finish(other.call)
    assert [end.calls for end in driver.workflows.tick(driver.now)] == [2]


def test_the_same_run_name_after_the_end_is_a_new_run() -> None:
    driver = Driver()
    driver.call([user("x")], run="r", node="n", final=True)
    assert driver.call([user("y")], run="r", node="n").node == "n"
    assert [run["state"] for run in driver.workflows.runs()] == ["live", "done"]


def test_tenants_do_not_share_runs() -> None:
    driver = Driver()
    driver.call([user("x")], tenant="a", run="r", node="n")
    driver.call([user("x")], tenant="b", run="r", node="n")
    assert [run["calls"] for run in driver.workflows.runs()] == [1, 1]
    assert driver.workflows.run("r", tenant="c") is None


def test_run_json_has_the_documented_fields() -> None:
    driver = Driver()
    driver.call([user("x")], workflow="w", run="r", node="n")
    run = driver.workflows.run("r")
    assert run is not None
    assert (run["run"], run["workflow"], run["state"]) == ("r", "w", "live")
    assert set(run["nodes"][0]) >= {
        "call", "node", "state", "fate", "worker", "prompt_tokens", "cached_tokens", "predicted_cached_tokens",
        "output_tokens", "queued_at", "started_at", "first_token_at", "finished_at",
    }  # fmt: skip
    assert driver.workflows.runs(workflow="other") == []
    assert driver.workflows.runs(state="done") == []
    assert len(driver.workflows.runs(limit=1, workflow="w", state="live")) == 1


def test_mermaid_and_dot_quote_names() -> None:
    driver = Driver()
    a = driver.call([user("x")], run="r", node='a"]; evil<b>')
    driver.call([user("y")], run="r", node="b", parents=[a.call])
    mermaid, dot = driver.workflows.mermaid("r"), driver.workflows.dot("r")
    assert mermaid == 'flowchart TD\n  n0["a\']; evil‹b›"]\n  n1["b"]\n  n0 --> n1\n'
    assert dot is not None
    assert "n0 -> n1 [style=solid];" in dot
    assert driver.workflows.mermaid("none") is None


def test_the_graph_is_a_dag() -> None:
    driver = Driver()
    driver.call([user("x")], run="r", node="a", parents=[])
    driver.call([user("y")], run="r", node="b", parents=["a"])
    run = driver.workflows._runs.find("r")
    assert run is not None
    assert nx.is_directed_acyclic_graph(run.graph)
    assert list(run.graph.nodes(data="node")) == [("chatcmpl-1", "a"), ("chatcmpl-2", "b")]


@pytest.mark.parametrize("ended", [True, False])
def test_runs_and_calls_are_bounded(ended: bool) -> None:
    settings = WorkflowSettings(max_runs=10, max_calls=50, max_calls_per_run=20)
    driver = Driver(settings)
    for at in range(100):
        for _ in range(3):
            driver.call([user(f"q{at}")], "a", run=f"r{at}", node="n", final=ended and _ == 2)
    for at in range(100):
        driver.call([user(f"z{at}")], run="big", node="n")
    statistics = driver.workflows.statistics()
    assert statistics.runs_kept <= 10
    assert statistics.calls_kept <= 50
    assert statistics.failures == 0
    big = driver.workflows.run("big")
    assert big is not None
    assert len(big["nodes"]) <= 20
    assert big["dropped_calls"] == 80
    assert big["nodes"][-1]["node"] == "n#100"


def test_names_and_placeholders_of_forgotten_runs_leave_too() -> None:
    driver = Driver(WorkflowSettings(max_runs=5))
    for at in range(200):
        driver.call([user("x")], headers={"x-session-id": f"s{at}"}, workflow="w")
    assert len(driver.workflows._runs._names) <= 10
    assert len(driver.workflows._runs._aliases) <= 5
    assert len(driver.workflows._runs._agents) <= 20
    assert len(driver.workflows._pending) == 0


def test_a_run_that_never_ends_stays_bounded() -> None:
    """A conversation of a thousand turns, with placeholders and reply ids of its own."""
    driver = Driver(WorkflowSettings(max_calls_per_run=50, template_refresh_s=0))
    before: str | None = None
    for at in range(1_000):
        parents = [before, f"never-{at}"] if before else []
        call = driver.arrive([user(str(at))], run="r", node="turn", parents=parents)
        driver.finish(call.call, "ok", reply_id=f"resp_{at}")
        before = call.call
    run = driver.workflows._runs.find("r")
    assert run is not None
    sizes = {
        name: len(getattr(run, name))
        for name in (
            *("calls", "names", "waiting", "sibling_counts", "key_counts", "finished_keys", "root_keys"),
            *("occurrences", "counts"),
        )
    }
    assert max(sizes.values()) <= 101, sizes
    assert len(run.occurrences["turn"]) == 50
    assert driver.workflows.statistics().calls_kept == 50
    assert driver.workflows.statistics().failures == 0


def test_an_error_of_ours_costs_the_place_and_not_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(driver.workflows._messages, "read", lambda *_: 1 / 0)
    arrival = driver.arrive([system("s"), user("x")])
    assert arrival.call == "chatcmpl-1"
    assert driver.workflows.statistics().failures == 1
    driver.finish(arrival.call, "fine")


def test_a_forgotten_run_does_not_wait_for_the_garbage_collector() -> None:
    driver = Driver(WorkflowSettings(max_runs=3))
    gc.collect()
    gc.disable()
    try:
        for number in range(12):
            first = driver.call([user(f"{number}")], run=f"untied-{number}", node="a", parents=[])
            driver.call([user(f"then {number}")], run=f"untied-{number}", node="b", parents=[first.call])
        known = sum(isinstance(o, Run) and o.id.startswith("untied-") for o in gc.get_objects())
        driver.workflows.tick(driver.now)
        left = sum(isinstance(o, Run) and o.id.startswith("untied-") for o in gc.get_objects())
    finally:
        gc.enable()
    assert known >= left == 3
    assert driver.workflows.statistics().replies == 6


def test_children_that_wait_for_a_name_are_not_searched_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    monkeypatch.setattr(graph, "below", lambda calls: searched.append(calls) or set())
    driver = Driver()
    driver.call([user("0")], run="r", node="n0", parents=["X"])
    for i in range(1, 50):
        driver.call([user(f"{i}")], run="r", node=f"n{i}", parents=["X", f"n{i - 1}"])
    last = driver.call([user("x")], run="r", node="X", parents=[])
    assert len(driver.edges("r")) == 49 + 50
    assert sum(parent == last.call for parent, _ in driver.edges("r")) == 50
    assert not searched, "nothing is above a call without parents"


def test_a_run_that_never_ends_remembers_no_more_than_its_calls() -> None:
    driver = Driver(WorkflowSettings(max_calls_per_run=50))
    for i in range(400):
        driver.call([user(f"{i}")], run="r", node=f"node {i}")
    run = driver.workflows._runs.of("t", "r")
    assert run is not None
    assert len(run.calls) == len(run.occurrences) == len(run.counts) == 50


def test_names_of_a_run_are_bounded() -> None:
    driver = Driver()
    driver.call([user("0")], run="r", node="n")
    runs = driver.workflows._runs
    run = runs.of("t", "r")
    assert run is not None
    for i in range(3_000):
        runs._alias(run, f"child {i}")
    assert len(runs._aliases[run.seq]) == 1_000
    assert sum(found is run for found in runs._names.values()) == 1_000
    assert runs.of("t", "r") is run, "its id is never forgotten"
    assert runs.of("t", "child 2999") is run
    assert runs.of("t", "child 0") is None


def test_a_retry_s_reply_says_nothing_that_its_own_prompt_said() -> None:
    document = "The treaty of Verdun divided the empire among three brothers in August of 843."
    for failed in (False, True):
        driver = Driver()
        headers = {"x-stainless-retry-count": "0"}
        asked = [user(f"Quote this: {document}")]
        first = driver.arrive(asked, headers=headers)
        if failed:
            driver.finish(first.call, fate="error", status=503)
            again = driver.arrive(asked, headers={"x-stainless-retry-count": "1"})
            assert again.call == first.call
        driver.finish(first.call, f"He said: {document}")
        driver.call([user(f"Date this: {document}")], "843.")
        assert driver.all_edges() == set()
