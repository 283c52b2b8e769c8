"""`mode: passthrough`: calls are answered whatever is wrong with what plans them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serving import Stack

from helium_proxy import metrics


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug")


async def test_nothing_is_planned(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [await stack.fake(), await stack.fake()]
    proxy = await stack.proxy(*workers, mode="passthrough")
    services = proxy.services
    for room, what in (
        (services.workflows, "arrive"),
        (services.workflows, "finished"),
        (services.estimator, "estimate"),
        (services.ahead, "sent"),
        (services.dispatcher.state, "enqueue"),
    ):
        monkeypatch.setattr(type(room), what, broken)
    monkeypatch.setattr("helium_proxy.gateway.llm.cache_key", broken)
    monkeypatch.setattr("helium_proxy.gateway.compute.compare", broken)
    failures = [counter._value.get() for counter in metrics.FAIL_OPEN._metrics.values()]
    tags = {"run": "r", "node": "n", "parents": ["m"]}
    answers = await asyncio.gather(*(proxy.chat(temperature=0, helium=tags) for _ in range(6)))
    assert [a.status_code for a in answers] == [200] * 6
    assert {a.headers["x-helium-cache"] for a in answers} == {"bypass"}
    assert [len(w.seen) for w in workers] == [3, 3]
    assert all("helium" not in seen.body for worker in workers for seen in worker.seen)
    assert [counter._value.get() for counter in metrics.FAIL_OPEN._metrics.values()] == failures
    assert (await proxy.client.get("/helium/runs/r")).status_code == 404
    assert services.dispatcher.statistics().running == 0


async def test_a_worker_that_fails_is_left_for_another(stack: Stack) -> None:
    gone, worker = await stack.fake(), await stack.fake()
    proxy = await stack.proxy(gone, worker, mode="passthrough")
    await gone.server.kill()
    answers = await asyncio.gather(*(proxy.chat() for _ in range(8)))
    assert [a.status_code for a in answers] == [200] * 8
    assert len(worker.seen) == 8
