"""The executor: order, dependencies, partial failure, cancellation, and what it tells the dispatcher."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from helium_proxy.errors import NoWorker, QueueFull
from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.execute import CallResult, JobRun, reply_text
from helium_proxy.planner.pipeline import Planning, make_physical
from helium_proxy.planner.plan import parse_plan
from helium_proxy.planner.settings import PlanSettings
from tests.planner.fakes import FakePort, Seen

MAP_REDUCE = {
    "workflow": "map-reduce",
    "model": "m",
    "params": {"temperature": 0, "max_tokens": 8},
    "nodes": [
        {"id": "e0", "prompt": "first {{inputs.q}}"},
        {"id": "e1", "prompt": "second {{inputs.q}}"},
        {"id": "sum", "prompt": "{{nodes.e0}}+{{nodes.e1}}"},
    ],
    "inputs": [{"q": "x"}, {"q": "y"}],
}


def run_of(
    port: FakePort,
    raw: dict[str, Any] | None = None,
    *,
    cache: dict[str, str] | None = None,
    keep_bodies: bool = False,
    **settings: Any,
) -> JobRun:
    chosen = PlanSettings(**settings)
    lookup = None if cache is None else (lambda body: cache.get(body["prompt"]))
    workers = [PlanWorker("w0"), PlanWorker("w1")]
    plan = make_physical(parse_plan(raw or MAP_REDUCE), Planning(chosen, workers, lookup=lookup))
    ticks = iter(range(1_000_000))
    return JobRun(
        plan,
        port,
        chosen,
        job="wf_1",
        tenant="t",
        run_seq=7,
        clock=lambda: float(next(ticks)),
        keep_bodies=keep_bodies,
    )


def states(run: JobRun) -> dict[str, str]:
    return {run.plan.graph.operators[id_].name: found.state for id_, found in run.operators.items()}


async def test_outputs_flow_along_the_edges() -> None:
    port = FakePort()
    run = run_of(port)
    await run.run()
    assert [row.outputs for row in run.rows] == [
        {"sum": "sum(e0(first x)+e1(second x))"},
        {"sum": "sum(e0(first y)+e1(second y))"},
    ]
    assert [row.state for row in run.rows] == ["completed", "completed"]
    assert repr(run) == "<JobRun wf_1 done=6>"
    statistics = run.statistics()
    assert statistics.operators == {"done": 6}
    assert statistics.fates == {"computed": 6}
    assert (statistics.prompt_tokens, statistics.cached_tokens, statistics.output_tokens) == (60, 24, 18)


async def test_calls_start_in_plan_order_with_its_worker_and_hints() -> None:
    port = FakePort()
    run = run_of(port)
    await run.run()
    ranks = [seen.hints.plan_rank for seen in port.seen if seen.hints]
    assert ranks == sorted(ranks) == list(range(6))
    first, last = port.seen[0], port.seen[-1]
    assert {seen.worker for seen in port.seen} == {"w0", "w1"}
    assert {seen.tenant for seen in port.seen} == {"t"}
    assert first.hints is not None
    assert (first.hints.path_calls, first.hints.path_output_tokens, first.hints.last) == (1, 8.0, False)
    assert first.hints.path_prompt_tokens == run.plan.tree.prompts[2]
    assert (first.hints.output_tokens, first.hints.run_seq, first.hints.row) == (8.0, 7, 0)
    assert last.hints is not None
    assert (last.hints.path_calls, last.hints.last, last.hints.siblings_to_come) == (0, True, 0)
    siblings = [
        seen.hints.siblings_to_come for seen in port.seen if seen.hints and seen.headers["x-helium-run"] == "wf_1/0"
    ]
    assert siblings == [1, 0, 0]


async def test_headers_tag_calls_as_live_traffic_would() -> None:
    port = FakePort()
    await run_of(port).run()
    by_node = {(seen.headers["x-helium-run"], seen.node): seen.headers for seen in port.seen}
    ids = {(s.headers["x-helium-run"], s.node): f"chatcmpl-{i}" for i, s in enumerate(port.seen, 1)}
    assert by_node["wf_1/1", "e0"] == {
        "x-helium-workflow": "map-reduce",
        "x-helium-run": "wf_1/1",
        "x-helium-node": "e0",
        "x-helium-parents": "",
    }
    assert by_node["wf_1/1", "sum"]["x-helium-parents"] == f"{ids['wf_1/1', 'e0']},{ids['wf_1/1', 'e1']}"
    assert by_node["wf_1/1", "sum"]["x-helium-final"] == "true"


async def test_switches_leave_out_order_and_placement() -> None:
    port = FakePort()
    await run_of(port, ordering=False, placement=False).run()
    assert {(seen.hints, seen.worker) for seen in port.seen} == {(None, None)}


async def test_no_more_calls_in_flight_than_allowed() -> None:
    port = FakePort()
    run = run_of(port, {**MAP_REDUCE, "inputs": [{"q": str(i)} for i in range(10)]}, max_in_flight=3)
    await run.run()
    assert port.most_running == 3
    assert states(run).keys() == {f"{n}[{i}]" for n in ("e0", "e1", "sum") for i in range(10)}


async def test_a_consumer_starts_while_other_rows_still_run() -> None:
    """Nothing waits for a level to be complete."""
    port = FakePort()
    slow = asyncio.Event()

    async def call(body: dict[str, Any], **rest: Any) -> CallResult:
        if body["prompt"] == "first y":
            await slow.wait()
        return await FakePort.call(port, body, **rest)

    port.call = call  # type: ignore[method-assign]
    run = run_of(port)
    task = asyncio.create_task(run.run())
    while run.rows[0].state == "running":
        await run.changed()
    assert states(run)["e0[1]"] == "running"
    slow.set()
    await task
    assert run.rows[1].state == "completed"


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [
        (lambda: CallResult(400, {"error": {"message": "too long", "code": "c"}}, "error"), 400, "too long"),
        (lambda: CallResult(500, {"detail": "?"}, "error"), 500, "the call failed"),
        (lambda: CallResult(200, {"choices": []}), 502, "no choices"),
        (lambda: (_ for _ in ()).throw(NoWorker("none")), 503, "none"),
        (lambda: (_ for _ in ()).throw(ZeroDivisionError("secret")), 500, "internal error"),
    ],
)
async def test_a_failed_operator_fails_only_what_depends_on_it(reply: Any, status: int, says: str) -> None:
    def answer(seen: Seen) -> Any:
        return reply() if seen.text == "first x" else f"{seen.node}({seen.text})"

    raw = {**MAP_REDUCE, "outputs": ["sum", "e1"]}
    run = run_of(FakePort(answer), raw)
    await run.run()
    first, second = run.rows
    assert first.state == "failed"
    assert first.outputs == {"e1": "e1(second x)"}
    assert says in first.errors["sum"]["message"]
    assert first.errors["sum"]["failed_operator"] == "e0[0]"
    assert "secret" not in str(first.errors)
    assert second.state == "completed"
    assert states(run)["e0[0]"] == "failed"
    assert states(run)["sum[0]"] == "skipped"
    assert run.operators[0].status == status


@pytest.mark.parametrize("raised", [True, False])
async def test_a_full_queue_is_waited_for(raised: bool) -> None:
    """More calls than the queue takes: those refused go in, in plan order, as others end."""
    port = FakePort()
    room = 2

    async def call(body: dict[str, Any], **rest: Any) -> CallResult:
        if port.running >= room:
            if raised:
                raise QueueFull("full")
            return CallResult(429, {"error": {"message": "full"}}, "error")
        return await FakePort.call(port, body, **rest)

    port.call = call  # type: ignore[method-assign]
    run = run_of(port, {**MAP_REDUCE, "inputs": [{"q": str(i)} for i in range(8)]}, refused_wait_s=0.001)
    await run.run()
    assert {row.state for row in run.rows} == {"completed"}
    assert port.most_running == room
    assert len(port.seen) == 24
    assert run.statistics().operators == {"done": 24}


async def test_a_full_queue_is_not_stormed() -> None:
    """A job of many calls tries again about as often as its calls end, not all of them each time."""
    ended = 0

    def reply(seen: Seen) -> str:
        nonlocal ended
        if port.running > 2:  # besides this one
            raise QueueFull("full")
        ended += 1
        return "yes"

    port = FakePort(reply)
    nodes = [{"id": "a", "messages": [{"role": "user", "content": "{{inputs.q}}"}]}]
    raw = {"workflow": "w", "model": "m", "nodes": nodes, "inputs": [{"q": str(i)} for i in range(300)]}
    run = run_of(port, raw, refused_wait_s=0.001)
    await run.run()
    assert {row.state for row in run.rows} == {"completed"}
    assert len(port.seen) < 5 * 300


async def test_a_queue_that_stays_full_fails_the_operator_in_the_end() -> None:
    asked = []

    async def call(body: dict[str, Any], **rest: Any) -> CallResult:
        asked.append(body["prompt"])
        raise QueueFull("full")

    port = FakePort()
    port.call = call  # type: ignore[method-assign]
    raw = {"model": "m", "nodes": [{"id": "a", "prompt": "x"}]}
    run = run_of(port, raw, refused_wait_s=0.0001, max_refusals=3)
    await run.run()
    assert len(asked) == 4
    assert run.rows[0].errors["a"]["code"] == "queue_full"


async def test_skipping_reaches_everything_downstream_once() -> None:
    nodes = [
        {"id": "a", "prompt": "a"},
        {"id": "b", "prompt": "{{nodes.a}}"},
        {"id": "c", "prompt": "{{nodes.a}}{{nodes.b}}"},
    ]
    run = run_of(FakePort(lambda seen: CallResult(500, {}, "error")), {"model": "m", "nodes": nodes})
    await run.run()
    assert states(run) == {"a[0]": "failed", "b[0]": "skipped", "c[0]": "skipped"}
    assert run.statistics().operators == {"failed": 1, "skipped": 2}
    assert sorted(name for _, name, _ in run.events) == ["input"] + ["operator"] * 4


async def test_merged_rows_both_get_the_result_of_one_call() -> None:
    port = FakePort()
    run = run_of(port, {**MAP_REDUCE, "inputs": [{"q": "x"}, {"q": "x"}]})
    await run.run()
    assert len(port.seen) == 3
    assert run.rows[0].outputs == run.rows[1].outputs


async def test_fetched_operators_make_no_call() -> None:
    port = FakePort()
    run = run_of(port, cache={"first x": "F", "second x": "S", "first y": "G"})
    await run.run()
    assert sorted(seen.text for seen in port.seen) == ["F+S", "G+e1(second y)", "second y"]
    assert run.rows[0].outputs == {"sum": "sum(F+S)"}
    assert run.statistics().fates == {"hit": 3, "computed": 3}
    everything = {**MAP_REDUCE, "outputs": ["e0"], "inputs": [{"q": "x"}]}
    run = run_of(port, everything, cache={"first x": "F"})
    await run.run()
    assert run.rows[0].outputs == {"e0": "F"}


async def test_cancelling_ends_the_calls_in_flight() -> None:
    port = FakePort(hold=True)
    run = run_of(port)
    task = asyncio.create_task(run.run())
    while port.running < 4:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (port.running, port.cancelled) == (0, 4)
    assert set(states(run).values()) == {"cancelled"}
    assert [row.state for row in run.rows] == ["cancelled", "cancelled"]
    assert run.statistics().in_flight == 0


async def test_cancelling_waits_for_slow_cleanup_and_keeps_what_was_answered() -> None:
    port = FakePort()
    cleaned = []

    async def call(body: dict[str, Any], **rest: Any) -> CallResult:
        if "first" not in body["prompt"]:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.001)
                cleaned.append(body["prompt"])
        return await FakePort.call(port, body, **rest)

    port.call = call  # type: ignore[method-assign]
    run = run_of(port, {**MAP_REDUCE, "outputs": ["e0", "sum"]})
    task = asyncio.create_task(run.run())
    while len(port.seen) < 2 or port.running:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(cleaned) == ["second x", "second y"]
    assert run.rows[0].outputs == {"e0": "e0(first x)"}
    assert run.rows[0].state == "cancelled"


async def test_texts_are_dropped_once_nobody_waits_for_them() -> None:
    run = run_of(FakePort(lambda seen: CallResult(500, {}, "error") if seen.text == "first y" else "t"))
    await run.run()
    assert run._texts == {}
    assert run._replies == {}


async def test_whole_answers_are_kept_only_when_asked_for() -> None:
    run = run_of(FakePort())
    await run.run()
    assert run.rows[0].bodies == {}
    run = run_of(FakePort(), keep_bodies=True)
    await run.run()
    assert run.rows[0].bodies["sum"].body["object"] == "chat.completion"


async def test_events_are_bounded_and_numbered() -> None:
    run = run_of(FakePort(), {**MAP_REDUCE, "inputs": [{"q": str(i)} for i in range(30)]}, max_events=16)
    await run.run()
    assert len(run.events) == 16
    assert [seq for seq, _, _ in run.events] == list(range(run.event_seq - 15, run.event_seq + 1))
    assert run.event_seq == 30 * (3 * 2 + 1)


async def test_actuals_are_relative_to_the_start() -> None:
    run = run_of(FakePort())
    await run.run()
    actual = run.actuals()[0]
    assert (actual.status, actual.fate, actual.worker) == ("done", "computed", "w0")
    assert (actual.prompt_tokens, actual.cached_tokens, actual.computed_tokens) == (10, 4, 6)
    assert actual.started_s is not None
    assert actual.finished_s is not None
    assert 0 < actual.started_s < actual.finished_s


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"choices": [{"message": {"content": "x"}}]}, "x"),
        ({"choices": [{"message": {"content": None, "tool_calls": []}}]}, ""),
        ({"choices": [{"text": "y"}]}, "y"),
    ],
)
def test_reply_text(body: dict[str, Any], text: str) -> None:
    assert reply_text(body) == text


async def test_the_tags_of_its_calls_are_the_plan_s_own() -> None:
    """Whatever the script of its name, and no more parents than a call may name."""
    port = FakePort()
    producers = [{"id": f"p{i}", "prompt": f"{i}"} for i in range(70)]
    reduce = {"id": "all", "prompt": "".join(f"{{{{nodes.p{i}}}}}" for i in range(70))}
    await run_of(port, {"workflow": "сводка", "model": "m", "nodes": [*producers, reduce]}).run()
    (last,) = [seen for seen in port.seen if seen.node == "all"]
    assert last.headers["x-helium-workflow"] == "сводка"
    assert len(last.headers["x-helium-parents"].split(",")) == 64
