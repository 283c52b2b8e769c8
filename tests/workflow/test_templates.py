"""Templates: what five runs of Trading say of the sixth, a first batch of itself; loops, fan-outs, stores, bounds."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from helium_proxy.types import Hints
from helium_proxy.workflow import MemoryTemplateStore, SqliteTemplateStore, WorkflowSettings

from .driver import Driver, assistant, system, user
from .shapes import Play, Step, interleave, map_reduce, trading

EAGER = WorkflowSettings(template_refresh_s=0)


def iterations(steps: list[Step]) -> dict[str, tuple[str, int]]:
    """Step key → (node, iteration): 1 + the most calls of that node on one path of its ancestors."""
    by_key = {step.key: step for step in steps}
    found: dict[str, tuple[str, int]] = {}

    def above(key: str, node: str) -> int:
        best = 0
        for parent in by_key[key].parents:
            best = max(best, above(parent, node) + (by_key[parent].node == node))
        return best

    for step in steps:
        found[step.key] = (step.node, 1 + above(step.key, step.node))
    return found


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "untagged"])
def test_the_sixth_trading_run_is_predicted_at_every_point(tagged: bool) -> None:
    steps = trading()
    place = iterations(steps)
    lengths: dict[tuple[str, int], Counter[str]] = {}
    for step in steps:
        here = lengths.setdefault(place[step.key], Counter())
        here.update(prompt=step.prompt_tokens, output=step.output_tokens, calls=1)
    driver = Driver(EAGER)
    play = Play(driver, seed=11, tagged=tagged)
    for number in range(5):
        play.run(f"r{number}", steps)
        if not tagged:
            driver.workflows.tick(driver.now + 1_000)
    right = predicted = actual = points = 0

    def each(run: str, left: list[Step]) -> None:
        nonlocal right, predicted, actual, points
        if not tagged and len(left) > 84:
            return  # the four analysts: separate runs until a reply shows that they are one
        name = run if tagged else driver.workflows.runs(limit=1)[0]["run"]
        expected = {(calls.node, calls.iteration): calls for calls in driver.workflows.expected(name, driver.now)}
        guess = Counter({key: calls.calls for key, calls in expected.items()})
        truth = Counter(place[step.key] for step in left)
        right += (guess & truth).total()
        predicted += guess.total()
        actual += truth.total()
        points += 1
        for node, iteration in guess & truth:
            prompt, output = expected[node, iteration].prompt_tokens, expected[node, iteration].output_tokens
            mean = lengths[(node, iteration)]
            assert prompt == pytest.approx(mean["prompt"] / mean["calls"], rel=0.10)
            assert output == pytest.approx(mean["output"] / mean["calls"], rel=0.25)

    play.run("sixth", steps, each)
    assert points >= 84
    assert right / predicted >= 0.95
    assert right / actual >= 0.95


def test_expected_next_names_the_calls_that_follow() -> None:
    """At each end of a call of a known workflow: what arrives next because of it is what was said."""
    steps = trading()
    place = iterations(steps)
    driver = Driver(EAGER)
    play = Play(driver, seed=2)
    for number in range(5):
        play.run(f"r{number}", steps)
    right = predicted = actual = 0
    done: set[str] = set()
    left = list(steps)
    play.replies.clear()
    for step in steps:  # one call at a time, in the shape's order
        play._arrive("sixth", step, "q", last=False)
        left.remove(step)
        play._finish("sixth", step)
        ready_before = {other.key for other in left if done.issuperset(other.parents)}
        done.add(step.key)
        new = [other for other in left if done.issuperset(other.parents) and other.key not in ready_before]
        truth = Counter(place[other.key] for other in new)
        said: Counter[tuple[str, int]] = Counter()
        for item in driver.workflows.expected_next(play.calls[("sixth", step.key)], driver.now):
            said[(item.node, item.iteration)] += round(item.count)
        right += (said & truth).total()
        predicted += said.total()
        actual += truth.total()
    assert right / actual >= 0.95
    assert right / predicted >= 0.95


def test_hints_on_a_known_workflow() -> None:
    steps = trading()
    driver = Driver(EAGER)
    play = Play(driver, seed=4)
    for number in range(5):
        play.run(f"r{number}", steps)
    hints: dict[str, Hints] = {}
    for step in steps:
        parents = [play.calls[("sixth", parent)] for parent in step.parents]
        messages = [system(f"You are the {step.node}. Follow the house rules of the {step.node} desk."), user("q")]
        arrival = driver.arrive(
            messages, id_=f"s-{step.key}", workflow="shape", run="sixth", node=step.node, parents=parents
        )
        play.calls[("sixth", step.key)] = arrival.call
        hints[step.key] = arrival.hints
        driver.finish(arrival.call)
    first, trader, fund = hints["fundamentals"], hints["trader0"], hints["fund"]
    # analyst, bull, bear, manager, trader, nine of risk, fund manager
    assert first.path_calls == 3 + 1 + 9 + 1
    assert trader.path_calls == 10
    assert fund.path_calls == 0
    assert [hint.last for hint in (first, trader, fund)] == [False, False, True]
    assert first.siblings_to_come == 3
    assert hints["technical"].siblings_to_come == 0
    assert [hints[f"trader{at}"].siblings_to_come for at in (0, 3, 7)] == [7, 4, 0]
    assert trader.output_tokens == pytest.approx(120, rel=0.25)
    assert trader.path_output_tokens == pytest.approx(3 * 80 + 3 * 90 + 3 * 100 + 300, rel=0.1)
    assert trader.path_prompt_tokens == pytest.approx(3 * 800 + 3 * 1_100 + 3 * 1_400 + 3_000, rel=0.1)
    assert first.run_seq > 5


def test_a_first_batch_teaches_itself() -> None:
    """Eight runs of an unknown workflow at once: those behind are told by those ahead."""
    driver = Driver(EAGER)
    play = Play(driver, seed=1)
    steps = map_reduce()
    ahead = play.stepwise("ahead", steps)
    for _ in ahead:
        pass
    behind = driver.arrive([system("x"), user("q")], workflow="shape", run="behind", node="expert0", parents=[])
    assert behind.hints.path_calls == 1
    assert behind.hints.siblings_to_come == 6
    assert behind.hints.output_tokens is not None
    fresh = Driver(EAGER)
    play = Play(fresh, seed=1)
    halfway = play.stepwise("live", steps)
    for _ in range(15):
        next(halfway)
    assert fresh.workflows.runs()[0]["state"] == "live"
    behind = fresh.arrive([system("x"), user("q")], workflow="shape", run="behind", node="expert0", parents=[])
    assert behind.hints.path_calls == 1
    assert behind.hints.siblings_to_come == 6


def test_what_has_not_been_followed_yet_in_runs_that_still_go_may_be() -> None:
    driver = Driver(EAGER)
    for run in ("one", "two"):
        arrival = driver.arrive([system("x"), user("q")], workflow="shape", run=run, node="draft", parents=[])
        driver.finish(arrival.call)
    again = driver.arrive([system("x"), user("q")], workflow="shape", run="three", node="draft", parents=[])
    assert not again.hints.last


def test_fan_out_follows_what_the_run_has_shown() -> None:
    """A planner decides how many workers there are; each has one checker."""
    driver = Driver(EAGER)
    play = Play(driver, seed=1)

    def shape(width: int) -> list[Step]:
        workers = [Step(f"w{at}", "worker", ("plan",)) for at in range(width)]
        checks = [Step(f"c{at}", "check", (f"w{at}",)) for at in range(width)]
        return [Step("plan", "plan"), *workers, *checks, Step("end", "end", tuple(c.key for c in checks))]

    for number, width in enumerate((4, 5, 6, 5, 5)):
        play.run(f"r{number}", shape(width))
    live = play.stepwise("live", shape(9))
    while driver.workflows.run("live") is None or len(driver.workflows.run("live")["nodes"]) < 10:  # type: ignore[index]
        next(live)
    left = {(calls.node, calls.iteration): calls.calls for calls in driver.workflows.expected("live", driver.now)}
    arrived = Counter(node["node"].partition("#")[0] for node in driver.workflows.run("live")["nodes"])  # type: ignore[index]
    if arrived["worker"] == 9:
        assert left[("check", 1)] == 9 - arrived["check"]
    assert left[("end", 1)] == 1


def test_loops_have_probabilities() -> None:
    """A critic that sends the writer back half of the time."""
    driver = Driver(EAGER)
    for number in range(20):
        turns = 1 if number % 2 else 2
        before: list[str] = []
        for turn in range(turns):
            draft = driver.call([user("w")], workflow="l", run=f"r{number}", node="writer", parents=before)
            last = turn + 1 == turns
            review = driver.call(
                [user("c")], workflow="l", run=f"r{number}", node="critic", parents=[draft.call], final=last
            )
            before = [review.call]
    [template] = driver.workflows.templates()
    again = next(edge for edge in template["edges"] if edge["from"] == "critic" and edge["to"] == "writer#2")
    assert again["probability"] == pytest.approx(0.5, abs=0.1)
    assert template["runs"] == 20


def test_a_loop_deeper_than_ever_keeps_its_profile() -> None:
    driver = Driver(EAGER)
    driver.call([user("a")], workflow="l", run="r", node="step", parents=[])
    deep = driver.arrive([user("b")], workflow="l", run="r", node="step", parents=["step"])
    assert deep.hints.output_tokens == 10


def test_static_prefix_and_known_next_prompt() -> None:
    driver = Driver(EAGER)
    rules = [system("You are a clerk. " + "Rule. " * 50), user("The form is in three parts.")]
    for number in range(3):
        a = driver.call([user(f"q{number}")], f"a{number}", workflow="w", run=f"r{number}", node="ask", parents=[])
        driver.call(
            [*rules, user(f"case {number}")],
            workflow="w",
            run=f"r{number}",
            node="file",
            parents=[a.call],
            final=True,
        )
    a = driver.call([user("q9")], "a9", workflow="w", run="r9", node="ask", parents=[])
    [after] = driver.workflows.expected_next(a.call, driver.now)
    assert (after.node, after.iteration, after.probability) == ("file", 1, 1.0)
    assert after.model == "m"
    assert after.think_s == pytest.approx(0.1)
    assert not after.extends
    file = driver.arrive([*rules, user("case 9")], workflow="w", run="r9", node="file", parents=[a.call])
    assert file.hints.output_tokens == 10


def test_a_conversation_is_expected_to_go_on() -> None:
    driver = Driver(EAGER)
    for number in range(3):
        talk = [system("s"), user(f"q{number}")]
        one = driver.call(talk, f"reply {number}", workflow="w", run=f"r{number}", node="chat")
        if number < 2:
            talk += [assistant(f"reply {number}"), user("go on")]
            driver.call(talk, "end", workflow="w", run=f"r{number}", node="chat", final=True)
    [after] = driver.workflows.expected_next(one.call, driver.now)
    assert after.extends
    assert (after.node, after.iteration) == ("chat", 2)


def test_lookahead_waits_for_the_other_parents() -> None:
    driver = Driver(EAGER)
    play = Play(driver, seed=3)
    steps = map_reduce(3)
    for number in range(3):
        play.run(f"r{number}", steps)
    calls = [
        driver.arrive([user("q")], workflow="shape", run="live", node=f"expert{at}", parents=[]) for at in range(3)
    ]
    said = []
    for call in calls:
        driver.finish(call.call, "text")
        said.append([item.node for item in driver.workflows.expected_next(call.call, driver.now)])
    assert said == [[], [], ["summary"]]
    assert Driver(WorkflowSettings(lookahead=False)).workflows.expected_next(calls[0].call, 0) == []


def test_untagged_runs_find_their_template_again() -> None:
    driver = Driver(EAGER)
    play = Play(driver, seed=5, tagged=False)
    for number in range(4):
        play.run(f"r{number}", map_reduce())
        driver.workflows.tick(driver.now + 1_000)
        driver.now += 1_000
    template = driver.workflows.templates()[0]
    assert template["runs"] >= 3
    assert len(template["nodes"]) == 8
    arrival = driver.arrive([system("You are the expert3. Follow the house rules of the expert3 desk."), user("q")])
    assert arrival.template == template["template"]
    assert arrival.hints.path_calls == 1


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_templates_survive_a_restart(kind: str, tmp_path: Path) -> None:
    store = MemoryTemplateStore() if kind == "memory" else SqliteTemplateStore(tmp_path / "t" / "templates.db")
    before = Driver(EAGER, store)
    play = Play(before, seed=6)
    for number in range(3):
        play.run(f"r{number}", map_reduce())
    before.workflows.close()
    store = store if kind == "memory" else SqliteTemplateStore(tmp_path / "t" / "templates.db")
    after = Driver(EAGER, store)
    assert after.workflows.templates() == before.workflows.templates()
    arrival = after.arrive([user("q")], workflow="shape", run="r", node="expert0", parents=[])
    known = before.arrive([user("q")], workflow="shape", run="new", node="expert0", parents=[])
    assert arrival.hints.path_calls == known.hints.path_calls == 1
    assert arrival.hints.output_tokens == pytest.approx(known.hints.output_tokens)
    assert arrival.hints.siblings_to_come == 6
    after.workflows.close()


def test_a_broken_store_costs_templates_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tmp_path / "templates.db"
    broken.write_bytes(b"this is no database" * 100)
    store = SqliteTemplateStore(broken)
    driver = Driver(EAGER, store)
    Play(driver).run("r", map_reduce())
    driver.workflows.close()
    assert store.errors >= 2
    assert "cannot be read" in caplog.text


def test_an_unreadable_template_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryTemplateStore()
    store.blobs = {"a": b"{}", "b": b"no json", "c": b'{"v": 9}'}
    assert Driver(EAGER, store).workflows.templates() == []
    assert caplog.text.count("is not readable") == 3


def test_changed_templates_are_saved_by_tick() -> None:
    store = MemoryTemplateStore()
    driver = Driver(WorkflowSettings(save_interval_s=5), store)
    Play(driver).run("r", map_reduce())
    driver.workflows.tick(driver.now)
    assert store.blobs == {}
    driver.workflows.tick(driver.now + 6)
    assert list(store.blobs) == ["t/shape"]


def test_templates_and_their_nodes_are_bounded() -> None:
    store = MemoryTemplateStore()
    driver = Driver(WorkflowSettings(max_templates=5, max_template_nodes=10, template_refresh_s=0), store)
    for number in range(20):
        for at in range(30):
            driver.call([user("q")], workflow=f"w{number}", run=f"r{number}", node=f"n{at}", final=at == 29)
        driver.now += 10
        driver.workflows.tick(driver.now)
    assert len(driver.workflows.templates()) == 5
    assert len(store.blobs) <= 5
    assert all(len(template["nodes"]) <= 10 for template in driver.workflows.templates())
    assert len(driver.workflows._templates._forecasts) <= 5
    assert driver.workflows.statistics().failures == 0


def test_single_calls_leave_no_template() -> None:
    driver = Driver(WorkflowSettings(run_idle_s=1))
    for at in range(10):
        driver.call([user(f"{at} little things to ask")])
        driver.now += 10
        driver.workflows.tick(driver.now)
    assert len(driver.workflows.templates()) <= 1


def test_switched_off() -> None:
    driver = Driver(WorkflowSettings(templates=False))
    play = Play(driver, seed=1)
    play.run("r0", map_reduce())
    arrival = driver.arrive([user("q")], workflow="shape", run="r1", node="expert0", priority=3, deadline_ms=500)
    assert arrival.hints == Hints(run_seq=2, priority=3, deadline_s=0.5)
    assert driver.workflows.templates() == []


def test_batches_in_flight_close_their_counts() -> None:
    """After all runs have ended nothing live is left in a template, whatever the interleaving."""
    driver = Driver(EAGER)
    for tagged in (True, False):
        play = Play(driver, seed=8, tagged=tagged)
        dice = random.Random(3)
        interleave(dice, [play.stepwise(f"r{at}", map_reduce(4)) for at in range(6)])
        driver.now += 1_000
        driver.workflows.tick(driver.now)
    for template in driver.workflows._templates.all():
        for stats in template.nodes.values():
            assert stats.closed == (stats.calls or stats.closed)
            for edge in stats.edges.values():
                assert edge.live == 0
                assert edge.links >= edge.joined >= 0


def test_a_template_that_was_dropped_while_its_run_lived_costs_nothing() -> None:
    driver = Driver(WorkflowSettings(max_templates=2))
    driver.call([user("1")], run="slow", workflow="slow", node="a")
    driver.call([user("2")], run="slow", workflow="slow", node="b", parents=["a"])
    for i in range(5):
        driver.call([user(f"{i}")], run=f"r{i}", workflow=f"w{i}", node="n")
        driver.workflows.end_run(f"r{i}")
    driver.call([user("3")], run="slow", workflow="slow", node="c", parents=["b"])
    assert driver.workflows.end_run("slow")
    assert driver.workflows.statistics().failures == 0
    driver.now += 1_000
    driver.workflows.tick(driver.now)
