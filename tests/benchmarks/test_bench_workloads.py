"""The shapes: how many calls they make, that they are seeded, and that a plan is the same workflow as the program."""

from __future__ import annotations

import asyncio
import hashlib
import re

import pytest

from benchmarks.workloads import PAPER_SHAPES, SIZES, WORKLOADS, Call, Roles, Run, Workload, Writer, export_plan
from benchmarks.workloads.open_loop import bursts, poisson

SIZE = SIZES["tiny"]


class Echo:
    """Answers every call with a word that depends on its prompt only, as a greedy engine does."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    async def complete(self, call: Call) -> str:
        self.calls.append(call)
        await asyncio.sleep(0)
        return reply(call.messages)


def reply(messages: object) -> str:
    return "word" + hashlib.sha256(repr(messages).encode()).hexdigest()[:12]


async def play(workload: Workload, batch: int, seed: int = 1) -> list[Call]:
    echo = Echo()
    for phase, runs in enumerate(workload.make_inputs(Writer(seed), SIZE, batch)):
        for index, inputs in enumerate(runs):
            roles = Roles(workload.name, SIZE, Writer(seed))
            run = Run(echo, workload.name, f"{phase}-{index}", inputs=inputs, roles=roles, time_scale=0)
            await workload.program_of(inputs)(run)
    return echo.calls


@pytest.mark.parametrize("name", list(WORKLOADS))
async def test_calls_per_run(name: str) -> None:
    workload = WORKLOADS[name]
    calls = await play(workload, 2)
    phases = len(workload.make_inputs(Writer(1), SIZE, 2))
    if workload.calls_per_run is not None:
        assert len(calls) == 2 * phases * workload.calls_per_run
    for run in {call.run for call in calls}:
        nodes = [call.node for call in calls if call.run == run]
        assert len(nodes) == len(set(nodes)), "a node is asked once in a run"


async def test_trading_is_the_papers_firm() -> None:
    calls = await play(WORKLOADS["trading"], 1)
    assert len(calls) == 88
    assert len({call.messages[0]["content"] for call in calls}) == 19


@pytest.mark.parametrize("name", list(WORKLOADS))
async def test_same_seed_same_prompts(name: str) -> None:
    first, second = [await play(WORKLOADS[name], 3) for _ in range(2)]
    other = await play(WORKLOADS[name], 3, seed=2)
    assert first == second
    assert [call.messages for call in first] != [call.messages for call in other]
    assert {call.messages[0]["content"] for call in first} == {call.messages[0]["content"] for call in other}


@pytest.mark.parametrize("name", list(WORKLOADS))
async def test_parents_are_where_the_text_came_from(name: str) -> None:
    """Every declared parent's reply is in the prompt, and every earlier reply in the prompt is a declared parent's or
    came with one (a conversation carries its own past)."""
    calls = await play(WORKLOADS[name], 1)
    replies = {(call.run, call.node): reply(call.messages) for call in calls}
    for call in calls:
        text = " ".join(message["content"] for message in call.messages)
        for parent in call.parents:
            assert replies[call.run, parent] in text
        known = set(call.parents)
        pending = list(call.parents)
        while pending:
            node = pending.pop()
            ancestor = next(c for c in calls if (c.run, c.node) == (call.run, node))
            pending += set(ancestor.parents) - known
            known |= set(ancestor.parents)
        used = {node for (run, node), said in replies.items() if run == call.run and said in text}
        assert used <= known


@pytest.mark.parametrize("name", [*PAPER_SHAPES, "map_reduce_14", "two_day", "retrieval"])
async def test_plan_is_the_program(name: str) -> None:
    """Filling in a plan's templates gives exactly the prompts that the program sends."""
    workload = WORKLOADS[name]
    inputs = workload.make_inputs(Writer(1), SIZE, 2)[0]
    plan = await export_plan(workload, SIZE, Writer(1), inputs=inputs, model="demo")
    sent = {(call.run, call.node): call for call in await play(workload, 2) if call.run.startswith("0-")}
    assert len(plan["nodes"]) == workload.calls_per_run
    for index, given in enumerate(plan["inputs"]):
        replies: dict[str, str] = {}

        def fill(text: str, inputs: dict[str, str] = given, replies: dict[str, str] = replies) -> str:
            return re.sub(
                r"\{\{(inputs|nodes)\.(\w+)\}\}",
                lambda found: (inputs if found[1] == "inputs" else replies)[found[2]],
                text,
            )

        for node in plan["nodes"]:
            messages = tuple({"role": m["role"], "content": fill(m["content"])} for m in node["messages"])
            assert messages == sent[f"0-{index}", node["id"]].messages
            assert node["params"]["max_tokens"] == sent[f"0-{index}", node["id"]].max_tokens
            replies[node["id"]] = reply(messages)
    assert plan["outputs"]


async def test_what_is_decided_at_run_time_has_no_plan() -> None:
    with pytest.raises(ValueError, match="decided at run time"):
        await export_plan(WORKLOADS["tree_search"], SIZE, Writer(1), inputs=[{"context": "x"}], model="demo")


def test_second_day_repeats_half_of_the_companies() -> None:
    first, second = WORKLOADS["two_day"].make_inputs(Writer(1), SIZE, 4)
    assert [day == before for day, before in zip(second, first, strict=True)] == [True, False, True, False]
    assert all(day["fundamentals"] == before["fundamentals"] for day, before in zip(second, first, strict=True))


def test_retrieval_shares_documents() -> None:
    (runs,) = WORKLOADS["retrieval"].make_inputs(Writer(1), SIZE, 40)
    heads = [inputs["document_0"] for inputs in runs]
    assert len(set(heads)) < len(heads) / 2


def test_arrivals() -> None:
    offsets = poisson(400, 1)
    assert offsets == sorted(offsets)
    assert 400 / offsets[-1] == pytest.approx(1.5, rel=0.2)
    assert poisson(400, 1) == offsets != poisson(400, 2)
    assert len(set(bursts(32, 1))) == 4


def test_text_has_the_length_asked_for() -> None:
    text = Writer(1, tokens_per_word=2.0).text(200, "key")
    assert len(text.split()) == 100
    assert text != Writer(1, tokens_per_word=2.0).text(200, "other key")
