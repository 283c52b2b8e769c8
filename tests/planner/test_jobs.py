"""The job store: bounds, isolation, time, and how jobs end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from helium_proxy.errors import Draining, InvalidRequest, NotFound, QueueFull
from helium_proxy.planner.execute import CallResult
from helium_proxy.planner.jobs import JobStore, PlannerDeps
from helium_proxy.planner.settings import PlanSettings
from tests.planner.fakes import FakePort

RAW = {
    "model": "m",
    "params": {"temperature": 0},
    "nodes": [{"id": "a", "prompt": "{{inputs.q}}"}],
    "inputs": [{"q": "x"}],
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def stores() -> AsyncIterator[Any]:
    made: list[JobStore] = []

    def make(port: FakePort, clock: Clock | None = None, lookup: Any = None, **settings: Any) -> JobStore:
        deps = PlannerDeps(port, PlanSettings(**settings), clock=clock or Clock(), cache_lookup=lookup)
        made.append(JobStore(deps))
        return made[-1]

    yield make
    for store in made:
        await store.close()


async def test_a_job_runs_to_its_end(stores: Any) -> None:
    store = stores(FakePort())
    job = await store.submit("t", RAW)
    assert store.get("t", job.id) is job
    await job.done.wait()
    assert job.state == "completed"
    view = job.view()
    assert view["results"] == [{"input": 0, "status": "completed", "outputs": {"a": "a(x)"}}]
    assert view["operators"] == {"submitted": 1, "planned": 1, "done": 1}
    assert job.run.events[-1][1:] == ("job", {"state": "completed"})


@pytest.mark.parametrize(("bad", "state"), [(set(), "completed"), ({"x"}, "partial"), ({"x", "y"}, "failed")])
async def test_how_a_job_ends(stores: Any, bad: set[str], state: str) -> None:
    store = stores(FakePort(lambda seen: CallResult(500, {}, "error") if seen.text in bad else "ok"))
    job = await store.submit("t", {**RAW, "inputs": [{"q": "x"}, {"q": "y"}]})
    await job.done.wait()
    assert job.state == state


async def test_a_broken_executor_fails_the_job_and_says_so(stores: Any) -> None:
    store = stores(FakePort())
    job = await store.submit("t", RAW)
    job.run._start_ready = None
    await job.done.wait()
    assert job.state == "failed"
    assert job.run.rows[0].state == "cancelled"


async def test_bad_plans_leave_nothing_behind(stores: Any) -> None:
    store = stores(FakePort(), max_jobs_per_tenant=1)
    for _ in range(3):
        with pytest.raises(InvalidRequest):
            await store.submit("t", {"nodes": []})
    assert store.statistics().jobs == 0
    await (await store.submit("t", RAW)).done.wait()


async def test_a_tenant_sees_its_own_jobs_only(stores: Any) -> None:
    store = stores(FakePort())
    job = await store.submit("t", RAW)
    with pytest.raises(NotFound):
        store.get("u", job.id)
    assert store.mine("u") == []
    assert store.mine("t") == [job]


async def test_finished_jobs_expire(stores: Any) -> None:
    clock = Clock()
    store = stores(FakePort(), clock, job_ttl_s=10)
    job = await store.submit("t", RAW)
    await job.done.wait()
    clock.now += 9
    assert store.get("t", job.id) is job
    clock.now += 1
    with pytest.raises(NotFound):
        store.get("t", job.id)


async def test_the_oldest_finished_job_makes_room_and_no_running_one_does(stores: Any) -> None:
    port = FakePort()
    store = stores(port, max_jobs=2)
    first = await store.submit("t", RAW)
    await first.done.wait()
    port.gate.clear()
    second = await store.submit("t", RAW)
    third = await store.submit("t", RAW)
    assert store.mine("t") == [third, second]
    with pytest.raises(QueueFull) as caught:
        await store.submit("t", RAW)
    assert caught.value.status == 429
    port.release()
    await asyncio.gather(second.done.wait(), third.done.wait())
    await store.submit("t", RAW)


async def test_unfinished_jobs_of_a_tenant_are_bounded_also_while_being_planned(stores: Any) -> None:
    store = stores(FakePort(hold=True), max_jobs_per_tenant=2)
    found = await asyncio.gather(*(store.submit("t", RAW) for _ in range(4)), return_exceptions=True)
    assert sorted(type(one).__name__ for one in found) == ["Job", "Job", "QueueFull", "QueueFull"]
    await store.submit("u", RAW)


async def test_live_operators_are_bounded(stores: Any) -> None:
    store = stores(FakePort(hold=True), max_live_operators=3)
    await store.submit("t", {**RAW, "inputs": [{"q": str(i)} for i in range(5)]})  # alone it may be larger
    with pytest.raises(QueueFull, match="operators"):
        await store.submit("t", RAW)


async def test_results_are_bounded_in_memory(stores: Any) -> None:
    store = stores(FakePort(lambda seen: "x" * 100_000), max_kept_bytes=250_000)
    jobs = []
    for _ in range(4):
        jobs.append(await store.submit("t", RAW))
        await jobs[-1].done.wait()
    assert store.mine("t") == [jobs[3], jobs[2]]
    assert store.statistics().kept_bytes <= 250_000


async def test_cancel(stores: Any) -> None:
    port = FakePort(hold=True)
    store = stores(port)
    job = await store.submit("t", RAW)
    while not port.running:
        await asyncio.sleep(0)
    await store.cancel(job)
    assert (job.state, port.running, port.cancelled) == ("cancelled", 0, 1)
    await store.cancel(job)


async def test_cancel_before_the_first_step(stores: Any) -> None:
    store = stores(FakePort())
    job = await store.submit("t", RAW)
    assert job.run.began is None
    await store.cancel(job)
    assert job.state == "cancelled"
    assert job.view()["results"][0]["status"] == "cancelled"


async def test_close_cancels_and_refuses(stores: Any) -> None:
    port = FakePort(hold=True)
    store = stores(port)
    job = await store.submit("t", RAW)
    await store.close()
    assert job.state == "cancelled"
    with pytest.raises(Draining):
        await store.submit("t", RAW)


async def _awaited(text: str | None) -> str | None:
    await asyncio.sleep(0)
    return text


@pytest.mark.parametrize(
    ("lookup", "calls"),
    [
        (lambda tenant, body: f"{tenant}:{body['prompt']}", 0),
        (lambda tenant, body: _awaited(f"{tenant}:{body['prompt']}"), 0),
        (lambda tenant, body: None, 1),
        (lambda tenant, body: 1 / 0, 1),
    ],
)
async def test_the_prompt_cache_is_asked_for_the_tenant(stores: Any, lookup: Any, calls: int) -> None:
    port = FakePort()
    store = stores(port, lookup=lookup)
    job = await store.submit("t", RAW)
    await job.done.wait()
    assert len(port.seen) == calls
    assert job.run.rows[0].outputs == {"a": "a(x)" if calls else "t:x"}


async def test_planning_keeps_the_event_loop_free(stores: Any) -> None:
    store = stores(FakePort())
    big = {**RAW, "inputs": [{"q": f"{i} " * 50} for i in range(2_000)]}
    planning = asyncio.create_task(store.plan("t", big))
    turns = 0
    while not planning.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 20
    assert len((await planning).ids) == 2_000
