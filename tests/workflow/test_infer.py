"""Inference: what it sees, what it must not, and that interleaving changes nothing."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helium_proxy.workflow import WorkflowSettings

from .driver import Driver, assistant, system, tool, user
from .shapes import Play, interleave, map_reduce, sentence, trading

FACTS = "Spain had 2,500 hours of sun in 2023. Prices of panels fell by 80 percent since 2010."


def test_tool_results_follow_the_reply_that_called() -> None:
    driver = Driver()
    ask = [system("s"), user("q")]
    one = driver.call(ask, None, ["call_1"])
    two = driver.call([*ask, assistant(None, "call_1"), tool("call_1", "found")], "done")
    assert driver.all_edges() == {(one.call, two.call)}
    assert two.run == one.run
    assert (one.node, two.node) == ("assistant", "assistant#2") or two.node.endswith("#2")


def test_tool_ids_survive_a_history_that_was_rewritten() -> None:
    driver = Driver()
    one = driver.call([system("Today is Monday"), user("q")], None, ["call_1"])
    rewritten = [system("Today is Tuesday"), user("q"), assistant(None, "call_1"), tool("call_1", "x")]
    two = driver.call(rewritten)
    assert driver.all_edges() == {(one.call, two.call)}


def test_responses_items_and_previous_response_id() -> None:
    driver = Driver()
    body = {"instructions": "Be brief.", "input": "What is the weather?"}
    one = driver.call([], None, ["fc_1"], route="/v1/responses", body=body)
    given_back = [
        {"role": "user", "content": "What is the weather?"},
        {"type": "function_call", "call_id": "fc_1", "name": "w", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "fc_1", "output": "sunny"},
    ]
    two = driver.call([], "Sunny.", route="/v1/responses", body={"instructions": "Be brief.", "input": given_back})
    body = {"input": "And tomorrow?", "previous_response_id": two.call}
    three = driver.call([], "Rain.", route="/v1/responses", body=body)
    assert driver.all_edges() == {(one.call, two.call), (two.call, three.call)}


def test_messages_api_tool_use() -> None:
    driver = Driver()
    ask = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    one = driver.call([ask], None, ["toolu_1"], route="/v1/messages", body={"system": "s"})
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "x"}]}
    two = driver.call([ask, use, result], route="/v1/messages", body={"system": "s"})
    assert driver.all_edges() == {(one.call, two.call)}


def test_a_conversation_extends_its_latest_turn_only() -> None:
    driver = Driver()
    talk = [system("You are kind."), user("hello")]
    calls = []
    for turn in range(4):
        reply = f"ok {turn}"
        calls.append(driver.call(list(talk), reply).call)
        talk += [assistant(reply), user(f"more {turn}")]
    assert driver.all_edges() == set(itertools.pairwise(calls))


def test_an_edited_reply_is_not_that_reply() -> None:
    driver = Driver()
    driver.call([user("hello")], "yes")
    driver.call([user("hello"), assistant("no"), user("why?")])
    assert driver.all_edges() == set()


@pytest.mark.parametrize(
    "passed_on",
    [
        f"Write an article.\nFindings: {FACTS}\nBegin:",
        json.dumps({"findings": FACTS, "n": 1}),
        json.dumps({"outer": json.dumps({"findings": FACTS})}),
        f"> {FACTS.split('. ')[1]}",
        f"<facts>{FACTS}</facts>",
        f"- {FACTS}\n- something else",
        f"The expert said '{FACTS}' yesterday",
    ],
    ids=["template", "json", "json-in-json", "one sentence", "markup", "list", "quoted"],
)
def test_reply_text_is_recognised(passed_on: str) -> None:
    driver = Driver()
    one = driver.call([system("You are a researcher."), user("solar")], FACTS)
    two = driver.call([system("You are a writer."), user(passed_on)])
    assert driver.all_edges() == {(one.call, two.call)}


def test_a_parsed_field_of_a_json_reply_is_recognised() -> None:
    driver = Driver()
    reply = json.dumps({"opinion": "Storage will be the bottleneck \u2013 not generation.", "score": 7}, indent=2)
    one = driver.call([user("solar")], reply)
    two = driver.call([user("Merge: Storage will be the bottleneck \u2013 not generation.")])
    assert driver.all_edges() == {(one.call, two.call)}


def test_text_the_producer_was_given_is_no_evidence() -> None:
    driver = Driver()
    document = sentence(random.Random(1)) + " " + sentence(random.Random(2))
    driver.call([user(f"Summarise: {document}")], f"It says: {document}")
    driver.call([user(f"Translate: {document}")])
    assert driver.all_edges() == set()


def test_a_prompt_older_than_the_reply_was_not_made_from_it() -> None:
    driver = Driver()
    phrase = "Always answer with one of the three options given in the house rules."
    driver.call([system(phrase), user("a")], "x")
    driver.call([user("what are the rules?")], phrase)
    driver.call([system(phrase), user("b")], "y")
    assert driver.all_edges() == set()


def test_a_quotation_is_not_a_second_source() -> None:
    driver = Driver()
    a = driver.call([system("You are A."), user("q")], FACTS)
    b = driver.call(
        [system("You are B."), user(f"Criticise: {FACTS}")], f"Wrong: {FACTS} It was 2012 in truth, they say."
    )
    c = driver.call([system("You are C."), user(f"Judge: Wrong: {FACTS} It was 2012 in truth, they say.")])
    assert driver.all_edges() == {(a.call, b.call), (b.call, c.call)}


def test_no_edges_between_tenants() -> None:
    driver = Driver()
    driver.call([user("q")], FACTS, ["call_1"], tenant="a")
    driver.call([user(FACTS)], tenant="b")
    driver.call([user("q"), assistant(FACTS, "call_1"), tool("call_1", "x")], tenant="b")
    assert driver.all_edges() == set()


def test_explicit_runs_are_never_merged_and_untagged_calls_join_them() -> None:
    driver = Driver()
    a = driver.call([user("q")], FACTS, run="r1")
    driver.call([user(f"Use {FACTS}")], "other words altogether, for once", run="r2")
    joined = driver.call([user(f"Extend: {FACTS}")], "x")
    assert joined.run == "r1"
    assert driver.all_edges() == {(a.call, joined.call)}


def test_workflow_names_keep_workflows_apart() -> None:
    driver = Driver()
    driver.call([user("q")], FACTS, workflow="one")
    other = driver.call([user(FACTS)], workflow="two")
    assert driver.all_edges() == set()
    assert other.workflow == "two"


def test_a_second_run_of_the_same_program_uses_its_own_replies() -> None:
    """Equal prompts and replies, one run after the other: each step follows its own run's."""
    driver = Driver()
    expected = set()
    for _ in range(3):
        a = driver.call([system("You are a researcher."), user("solar")], FACTS)
        b = driver.call(
            [system("You are a writer."), user(f"Use: {FACTS}")], "An article about the sun and Spain, in short."
        )
        expected.add((a.call, b.call))
    assert driver.all_edges() == expected


def test_idle_runs_are_not_revived() -> None:
    driver = Driver(WorkflowSettings(run_idle_s=5))
    driver.call([user("q")], FACTS)
    driver.workflows.tick(driver.now + 10)
    driver.call([user(FACTS)])
    assert driver.all_edges() == set()


def test_two_hundred_interleaved_runs_of_equal_prompts_and_short_replies() -> None:
    """Every run: a yes/no question, a follow-up in the same conversation, a report on both. Prompts differ in the
    item only, replies are all but equal: whatever is inferred must be right."""
    driver = Driver()
    dice = random.Random(7)
    true: set[tuple[str, str]] = set()

    def one(number: int):  # type: ignore[no-untyped-def]
        item = f"item {number % 40}"  # five runs ask the very same
        talk = [system("You are a careful inspector. Answer yes or no."), user(f"Is {item} in order?")]
        first = driver.arrive(talk)
        yield
        answer = dice.choice(["yes", "yes", "no"])
        driver.finish(first.call, answer)
        yield
        talk += [assistant(answer), user("Are you sure?")]
        second = driver.arrive(talk)
        true.add((first.call, second.call))
        yield
        sure = dice.choice(["yes", "Yes, I am."])
        driver.finish(second.call, sure)
        yield
        reason = driver.arrive([system("You explain."), user(f"{item}: first {answer}, then {sure}. Give a reason.")])
        true.update({(first.call, reason.call), (second.call, reason.call)})
        yield
        text = dice.choice(
            ["It looked fine to me.", f"The {item} was checked on day {number} by inspector {number}."]
        )
        driver.finish(reason.call, text)
        yield
        last = driver.arrive([system("You are an archivist."), user(f"File this: {text}")])
        true.add((reason.call, last.call))
        yield
        driver.finish(last.call, "filed")

    interleave(dice, [one(number) for number in range(200)])
    found = driver.all_edges()
    assert len(found) >= 100, "where texts are unique, they are seen"
    assert len(found & true) / len(found) >= 0.95
    sizes = Counter(run["calls"] for run in driver.workflows.runs(limit=10_000))
    assert max(sizes) <= 4, "no run swallows another"


@pytest.mark.parametrize("steps", [trading(), map_reduce()], ids=["trading", "map-reduce"])
def test_untagged_shapes_are_recovered(steps: list) -> None:  # type: ignore[type-arg]
    driver = Driver()
    play = Play(driver, seed=3, tagged=False)
    interleave(random.Random(5), [play.stepwise(f"r{at}", steps) for at in range(4)])
    found = driver.all_edges()
    assert len(found & play.true) / len(found) >= 0.95
    assert len(found & play.true) / len(play.true) >= 0.90
    assert len(driver.workflows.runs(limit=1_000)) == 4


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.booleans())
def test_any_interleaving_gives_the_same_dag(dice: random.Random, tagged: bool) -> None:
    """Random small DAGs, three runs at once, in any order that respects what each call reads."""
    from .shapes import Step

    shape = random.Random(dice.randrange(20))
    steps: list[Step] = []
    for at in range(shape.randint(2, 9)):
        before = [step.key for step in steps]
        parents = tuple(sorted(shape.sample(before, min(len(before), shape.randint(0, 3)))))
        steps.append(Step(f"k{at}", f"node{shape.randint(0, 3)}", parents))
    driver = Driver()
    play = Play(driver, seed=dice.randrange(1_000_000), tagged=tagged)
    interleave(dice, [play.stepwise(f"r{at}", steps) for at in range(3)])
    assert driver.all_edges() == play.true
    assert driver.workflows.statistics().failures == 0


def test_everything_remembered_is_bounded() -> None:
    bounds = WorkflowSettings(max_replies=50, max_messages=100, max_identities=20, max_tenants=3, max_templates=10)
    driver = Driver(bounds)
    dice = random.Random(1)
    for at in range(600):
        reply = " ".join(sentence(dice) for _ in range(3))
        prompt = [system(f"You are {sentence(dice, 5)}"), user(sentence(dice))]
        driver.call(prompt, reply, [f"call_{at}"], tenant=f"t{at % 7}")
    statistics = driver.workflows.statistics()
    assert statistics.replies <= 150
    assert statistics.messages <= 100
    assert statistics.identities <= 60
    assert statistics.templates <= 10
    for tenant in driver.workflows._tenants.values():
        sizes = tenant.replies.sizes
        assert sizes["replies"] <= 50
        assert sizes["texts"] == sizes["prompts"] == sizes["tool_calls"] == sizes["replies"]
        assert sizes["units"] <= 150
        assert len(tenant.identities._buckets) <= 20
        assert len(tenant.identities._names) <= 41


def test_twins_leave_the_index_whole() -> None:
    driver = Driver(WorkflowSettings(max_replies=5))
    for _ in range(20):
        driver.call([user("same")], FACTS)
    index = driver.workflows._tenants["t"].replies
    assert index.sizes == {"replies": 5, "texts": 1, "units": 2, "prompts": 1, "tool_calls": 0}


def test_a_long_prompt_is_searched_within_its_budget() -> None:
    driver = Driver(WorkflowSettings(scan_chars=2_000))
    one = driver.call([user("q")], FACTS)
    long = "nothing of interest here, really. " * 2_000
    two = driver.call([user(long), user(f"Use {FACTS}")])
    three = driver.call([user(f"Use {FACTS} now"), user(long + "x")])
    assert (one.call, two.call) in driver.all_edges()
    assert (one.call, three.call) not in driver.all_edges()


def test_strange_bodies_do_no_harm() -> None:
    driver = Driver()
    bodies = [
        {"messages": "text"},
        {"messages": [None, 3, {"role": 5}, {"role": "user", "content": [1, None, {"type": "text"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [1, {"id": 7}, {"function": "x"}]}]},
        {"messages": [], "tools": "all", "response_format": "json"},
        {"messages": [{"role": "user", "content": {"a": 1}}], "system": [{"type": "text", "text": "x"}]},
        {"messages": [{"role": "user", "content": "\ud800 \\u12 \\uZZZZ \\ud83d"}]},
    ]
    for route in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"):
        for body in bodies:
            driver.finish(driver.arrive([], route=route, body=body).call, "fine")
        for prompt in ("text", ["a", "b"], [1, 2, 3], [[1], [2]], None, {"x": 1}):
            driver.finish(driver.arrive([], route=route, body={"prompt": prompt, "input": prompt}).call, None)
    assert driver.workflows.statistics().failures == 0


def test_previous_response_id_names_no_other_tenant_s_call() -> None:
    driver = Driver()
    theirs = driver.call([user("q")], "Sunny.", id_="chatcmpl-easy-to-guess")
    for extra in ({}, {"headers": {"x-claude-code-session-id": "mine"}}):
        body = {"previous_response_id": theirs.call}
        mine = driver.call([user("and?")], "Rain.", tenant="u", body=body, **extra)
        assert mine.run != theirs.run
    assert driver.all_edges() == set()
    assert {run["tenant"] for run in driver.workflows.runs(tenant="t")} == {"t"}
    assert len(driver.workflows.runs(tenant="t")) == 1
