"""The loop around the policy: callers wait, are served, leave; nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from helium_proxy.dispatch.dispatcher import Dispatcher
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.dispatch.state import Assignment, QueuedCall
from helium_proxy.errors import ModelNotFound, NoWorker, QueueFull
from helium_proxy.workers.breaker import Breaker
from helium_proxy.workers.settings import WorkerSpec, WorkersSettings
from helium_proxy.workers.worker import Facts, ModelInfo, Worker


class Workers(dict[str, Worker]):
    """What the dispatcher asks of the pool."""

    def all(self) -> list[Worker]:
        return list(self.values())


def fact(*models: str, blocks: int | None = None) -> Facts:
    cards = tuple(ModelInfo(m, 4096, None, {"id": m}) for m in models)
    return Facts(models=cards, block_size=16, num_blocks=blocks)


def make(*models: str, at_once: bool = False, **options: Any) -> tuple[Dispatcher, Workers]:
    """A dispatcher, and a worker that is up for each model."""
    pool = Workers()
    settings = DispatchSettings(**options)
    dispatcher = Dispatcher(settings, pool, clock=time.monotonic, at_once=at_once)  # type: ignore[arg-type]
    for i, model in enumerate(models):
        worker = Worker(WorkerSpec(url=f"http://w{i}:1"), WorkersSettings(), state="up")
        worker.facts = fact(model)
        pool[worker.id] = worker
        dispatcher.worker_changed(worker)
    return dispatcher, pool


def call(name: str, model: str = "demo", **fields: Any) -> QueuedCall:
    return QueuedCall(name, model, "t", (), 16, 10, 5.0, time.monotonic(), **fields)


def idle(dispatcher: Dispatcher) -> bool:
    statistics = dispatcher.statistics()
    return statistics.queued == statistics.running == 0 and not dispatcher._waiting


async def test_a_call_is_assigned_and_released() -> None:
    dispatcher, _ = make("demo")
    assignment = await dispatcher.acquire(call("a"))
    assert assignment.worker == "w0:1"
    assert dispatcher.statistics().running == 1
    dispatcher.release(assignment, ok=True, computed_tokens=10, output_tokens=5)
    assert idle(dispatcher)
    dispatcher.release(assignment, ok=False)
    assert idle(dispatcher), "released twice by mistake, counted once"


async def test_the_next_in_line_starts_when_one_ends() -> None:
    dispatcher, _ = make("demo", default_running=1)
    first = await dispatcher.acquire(call("a"))
    second = asyncio.create_task(dispatcher.acquire(call("b")))
    await asyncio.sleep(0.01)
    assert not second.done()
    dispatcher.release(first, ok=True)
    dispatcher.release(await asyncio.wait_for(second, 1), ok=True)
    assert idle(dispatcher)


async def test_whoever_leaves_the_queue_is_gone_from_it() -> None:
    dispatcher, _ = make("demo", default_running=1)
    first = await dispatcher.acquire(call("a"))
    second = asyncio.create_task(dispatcher.acquire(call("b")))
    await asyncio.sleep(0.01)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert dispatcher.statistics().queued == 0
    dispatcher.release(first, ok=True)
    await asyncio.sleep(0.01)
    assert idle(dispatcher)


async def test_whoever_leaves_in_the_very_moment_gives_the_slot_back() -> None:
    dispatcher, _ = make("demo")
    task = asyncio.create_task(dispatcher.acquire(call("a")))
    while not dispatcher.statistics().running:
        await asyncio.sleep(0)
    task.cancel()  # assigned, and not yet told
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert idle(dispatcher)


async def test_a_full_queue_refuses() -> None:
    dispatcher, _ = make("demo", default_running=1, max_queue=3)
    first = await dispatcher.acquire(call("a"))
    waiting = [asyncio.create_task(dispatcher.acquire(call(f"q{i}"))) for i in range(3)]
    await asyncio.sleep(0.01)
    with pytest.raises(QueueFull) as raised:
        await dispatcher.acquire(call("z"))
    assert raised.value.retry_after is not None
    assert 1 <= raised.value.retry_after <= 60
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    dispatcher.release(first, ok=True)
    assert idle(dispatcher)


async def test_a_model_that_nobody_has() -> None:
    dispatcher, _ = make("demo")
    with pytest.raises(ModelNotFound):
        await dispatcher.acquire(call("a", model="other"))
    assert idle(dispatcher)


async def test_no_worker_in_time() -> None:
    dispatcher, pool = make("demo", no_worker_wait_s=0.02)
    for worker in pool.values():
        worker.state = "down"
        dispatcher.worker_changed(worker)
    with pytest.raises(NoWorker):
        await dispatcher.acquire(call("a"))
    assert idle(dispatcher)


async def test_a_worker_in_time() -> None:
    dispatcher, pool = make(no_worker_wait_s=5)
    worker = Worker(WorkerSpec(url="http://late:1"), WorkersSettings())
    pool[worker.id] = worker
    task = asyncio.create_task(dispatcher.acquire(call("a")))
    await asyncio.sleep(0.01)
    assert not task.done()
    worker.facts, worker.state = fact("demo"), "up"
    dispatcher.worker_changed(worker)
    assert (await asyncio.wait_for(task, 1)).worker == "late:1"


async def test_a_worker_that_is_removed_takes_its_calls_with_it() -> None:
    dispatcher, pool = make("demo", "demo")
    assignment = await dispatcher.acquire(call("a"))
    dispatcher.worker_gone(pool.pop(assignment.worker))
    dispatcher.release(assignment, ok=False)
    assert idle(dispatcher)
    assert (await dispatcher.acquire(call("b"))).worker != assignment.worker


async def test_a_restart_empties_the_mirror_and_keeps_the_calls() -> None:
    dispatcher, pool = make("demo")
    assignment = await dispatcher.acquire(call("a"))
    (worker,) = pool.values()
    worker.epoch += 1
    dispatcher.worker_changed(worker)
    assert dispatcher.statistics().running == 1
    dispatcher.release(assignment, ok=True)
    assert idle(dispatcher)


async def test_siblings_that_arrive_together_are_decided_together() -> None:
    dispatcher, _ = make("demo", "demo")
    before = dispatcher.statistics().decisions
    await asyncio.gather(*(dispatcher.acquire(call(f"c{i}")) for i in range(20)))
    assert dispatcher.statistics().decisions == before + 1


async def test_a_bug_in_the_policy_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher, _ = make("demo", "demo")

    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr("helium_proxy.dispatch.dispatcher.decide", broken)
    assignments = await asyncio.gather(*(dispatcher.acquire(call(f"c{i}")) for i in range(10)))
    assert {a.worker for a in assignments} == {"w0:1", "w1:1"}
    for assignment in assignments:
        dispatcher.release(assignment, ok=True)
    assert idle(dispatcher)


async def test_calls_whose_last_worker_goes_down_do_not_wait_for_ever() -> None:
    dispatcher, pool = make("demo", default_running=1, no_worker_wait_s=5.0)
    running = await dispatcher.acquire(call("a"))
    waiting = asyncio.create_task(dispatcher.acquire(call("b")))
    await asyncio.sleep(0)
    pool["w0:1"].state = "down"
    dispatcher.worker_changed(pool["w0:1"])
    await asyncio.sleep(0)
    now = time.monotonic()
    dispatcher.tick(now)
    dispatcher.tick(now + 4.9)
    assert not waiting.done()
    pool["w0:1"].last_error = "refused"
    dispatcher.tick(now + 5.1)
    with pytest.raises(NoWorker, match=r"of model `demo` is up \(w0:1: refused\)"):
        await waiting
    dispatcher.release(running, ok=False)
    assert idle(dispatcher)


@pytest.mark.parametrize("placement", ["cost", "round-robin", "least-loaded"])
async def test_a_call_goes_to_the_worker_that_holds_its_state(placement: str) -> None:
    dispatcher, _ = make("demo", "demo", "demo", placement=placement)
    for i in range(4):
        assert (await dispatcher.acquire(call(f"c{i}", prefer="w1:1"))).worker == "w1:1"


async def test_calls_that_wait_for_a_worker_count_in_the_queue() -> None:
    dispatcher, pool = make(max_queue=2, no_worker_wait_s=5)
    early = [asyncio.create_task(dispatcher.acquire(call(name))) for name in "ab"]
    pool["w:1"] = worker = Worker(WorkerSpec(url="http://w:1"), WorkersSettings(), state="starting")
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await dispatcher.acquire(call("c"))
    worker.state, worker.facts = "up", fact("demo")
    dispatcher.worker_changed(worker)
    for assignment in await asyncio.gather(*early):
        dispatcher.release(assignment, ok=True)
    assert idle(dispatcher)


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_call_that_only_one_worker_can_answer_waits_for_it(at_once: bool) -> None:
    dispatcher, pool = make("demo", "demo", no_worker_wait_s=0.05, at_once=at_once)
    owner = pool["w0:1"]
    owner.state = "down"
    dispatcher.worker_changed(owner)
    with pytest.raises(NoWorker, match="continues"):
        await dispatcher.acquire(call("a", prefer="w0:1"))
    waiting = asyncio.create_task(dispatcher.acquire(call("b", prefer="w0:1")))
    await asyncio.sleep(0.01)
    owner.state = "up"
    dispatcher.worker_changed(owner)
    assignment = await waiting
    assert assignment.worker == "w0:1"
    dispatcher.release(assignment, ok=True)
    del pool["w0:1"]
    dispatcher.worker_gone(owner)
    assignment = await dispatcher.acquire(call("c", prefer="w0:1"))
    assert assignment.worker == "w1:1", "gone for good: the others may say so themselves"
    dispatcher.release(assignment, ok=True)
    assert idle(dispatcher)


async def test_a_prompt_that_was_never_computed_is_not_taken_for_resident() -> None:
    dispatcher, _ = make("demo")
    mirror = dispatcher.state.workers["w0:1"].residency
    chain = tuple(range(1, 9))
    for reached in (False, True):
        assignment = await dispatcher.acquire(replace(call(f"{reached}"), chain=chain))
        assert assignment.cached_tokens == 0
        dispatcher.release(assignment, ok=False, reached=reached)
        assert mirror.match(chain) == 8 * reached


async def test_a_half_open_worker_gets_one_call_and_the_rest_when_it_is_well() -> None:
    dispatcher, pool = make("demo")
    (worker,) = pool.values()
    worker.breaker = Breaker(failures=1, cooldown_s=0.0)
    worker.breaker.record(False, time.monotonic())
    calls = [asyncio.create_task(dispatcher.acquire(call(name))) for name in "abc"]
    await asyncio.sleep(0.01)
    assert sum(task.done() for task in calls) == 1
    worker.breaker.record(True, time.monotonic())
    dispatcher.worker_changed(worker)
    for assignment in await asyncio.gather(*calls):
        dispatcher.release(assignment, ok=True)
    assert idle(dispatcher)


async def test_at_once_a_call_goes_to_the_least_loaded_worker_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helium_proxy.dispatch.dispatcher.decide", None)  # called, it would fail
    dispatcher, _ = make("demo", "demo", "demo", at_once=True, max_running=1)
    held = [await dispatcher.acquire(call(f"c{i}")) for i in range(6)]
    assert sorted(a.worker for a in held) == ["w0:1", "w0:1", "w1:1", "w1:1", "w2:1", "w2:1"]
    freed = held.pop(3)
    dispatcher.release(freed, ok=True, computed_tokens=10, output_tokens=5)
    held.append(await dispatcher.acquire(call("next")))
    assert held[-1].worker == freed.worker
    held.append(await dispatcher.acquire(call("state", prefer="w1:1")))
    assert held[-1].worker == "w1:1"
    others = frozenset({"w0:1", "w2:1"})
    held.append(await dispatcher.acquire(call("again", exclude=others)))
    assert held[-1].worker == "w1:1"
    held.append(await dispatcher.acquire(call("anywhere", exclude=others | {"w1:1"})))
    for assignment in held:
        dispatcher.release(assignment, ok=False)
    assert idle(dispatcher)


async def test_at_once_equally_loaded_workers_take_turns() -> None:
    dispatcher, _ = make("demo", "demo", at_once=True)
    seen = []
    for i in range(4):
        seen.append(await dispatcher.acquire(call(f"c{i}")))
        dispatcher.release(seen[-1], ok=True)
    assert len({a.worker for a in seen}) == 2


async def test_at_once_a_call_waits_for_a_worker_to_be_available() -> None:
    dispatcher, pool = make("demo", at_once=True, no_worker_wait_s=5)
    (worker,) = pool.values()
    worker.breaker = Breaker(failures=1, cooldown_s=0.05)
    worker.breaker.record(False, time.monotonic())
    waiting = asyncio.create_task(dispatcher.acquire(call("a")))
    await asyncio.sleep(0)
    assert not waiting.done()
    dispatcher.release(await asyncio.wait_for(waiting, 5), ok=True)
    assert idle(dispatcher)


async def test_at_once_a_worker_that_does_not_have_the_model_is_no_preference() -> None:
    dispatcher, _ = make("demo", "other", at_once=True)
    assignment = await dispatcher.acquire(call("a", prefer="w1:1"))
    assert assignment.worker == "w0:1"
    dispatcher.release(assignment, ok=True)
    assert idle(dispatcher)


async def test_at_once_a_breaker_that_opens_meanwhile_is_waited_for() -> None:
    dispatcher, pool = make("demo", "demo", at_once=True, no_worker_wait_s=5)
    pool["w0:1"].breaker = Breaker(failures=1, cooldown_s=0.05)
    wait = dispatcher._wait_for_worker

    async def opens(worker: str) -> None:
        await wait(worker)
        if not opened:
            opened.append(worker)
            pool[worker].breaker.record(False, time.monotonic())

    opened: list[str] = []
    dispatcher._wait_for_worker = opens  # type: ignore[method-assign]
    assignment = await asyncio.wait_for(dispatcher.acquire(call("a", prefer="w0:1")), 5)
    assert (opened, assignment.worker) == (["w0:1"], "w0:1")
    dispatcher.release(assignment, ok=True)
    assert idle(dispatcher)


async def one_behind_another(**options: Any) -> tuple[Dispatcher, Worker, Assignment, asyncio.Task[Assignment]]:
    """Two calls that `w0:1` alone can answer, of which it runs one."""
    dispatcher, pool = make("demo", "demo", default_running=1, **options)
    first = await dispatcher.acquire(call("a", prefer="w0:1"))
    second = asyncio.create_task(dispatcher.acquire(call("b", prefer="w0:1")))
    await settled()
    assert dispatcher.state.queues["demo"].lanes["w0:1"]
    return dispatcher, pool["w0:1"], first, second


async def settled() -> None:
    """All that was to be done at once has been."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_call_in_the_lane_of_a_worker_that_goes_away_waits_for_it_to_come_back() -> None:
    dispatcher, owner, first, second = await one_behind_another(no_worker_wait_s=60)
    owner.breaker = Breaker(failures=1, cooldown_s=0.02)
    owner.breaker.record(False, time.monotonic())
    dispatcher.release(first, ok=True)
    await settled()
    assert not second.done(), "nobody else could answer it"
    dispatcher.release(await dispatcher.acquire(call("c")), ok=True)
    async with asyncio.timeout(5):
        while not second.done():
            dispatcher.tick(time.monotonic())
            await asyncio.sleep(0.01)
    assert second.result().worker == "w0:1", "the breaker has closed by time"
    dispatcher.release(second.result(), ok=True)
    assert idle(dispatcher)


async def test_a_call_whose_own_worker_stays_away_is_told_so() -> None:
    dispatcher, owner, first, second = await one_behind_another(no_worker_wait_s=5)
    owner.state = "down"
    dispatcher.worker_changed(owner)
    dispatcher.release(first, ok=False)
    await settled()
    now = time.monotonic()
    dispatcher.tick(now)
    dispatcher.tick(now + 4)
    await settled()
    assert not second.done()
    dispatcher.tick(now + 6)
    with pytest.raises(NoWorker, match="continues"):
        await asyncio.wait_for(second, 5)
    assert idle(dispatcher)
    dispatcher.tick(now + 7)
    assert not dispatcher._stranded
