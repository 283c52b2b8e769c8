"""Static prefixes pinned or kept warm, in front of embedded engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from serving import CHAT, Seen, Stack, answer, until

from helium_proxy import metrics
from helium_proxy.residency.directives import Prefixes

from .reviews import NO_REUSE, ROLE, batch, body, cached, flood, planned, probed, words


@pytest.mark.parametrize("pins", [True, False])
async def test_a_workflow_s_static_prefix_outlives_a_flood(stack: Stack, pins: bool) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    directives = {"pins": pins, "prewarm": False, "lookahead": False}
    proxy = await stack.proxy(engine, reuse=NO_REUSE, directives=directives)
    await probed(proxy)
    static = (await batch(proxy, 1000))[-1]
    assert static > 256
    if pins:
        await planned(proxy)
        await batch(proxy, 1500)
        (worker,) = proxy.services.pool.all()
        await until(lambda: worker.facts.pinned_blocks)
        assert worker.facts.pinned_blocks == static // 16
        (told,) = (await proxy.client.get("/helium/workers")).json()["workers"]
        assert list(told["pins"].values()) == [static // 16]
    await flood(proxy, 5 * 256, 7000)
    assert await cached(proxy, body(ROLE, "And now?", "critic", "last")) == (static if pins else 0)


async def test_pins_ride_on_streams_and_are_never_a_client_s(stack: Stack) -> None:
    worker = await stack.fake(kv_blocks=1000)
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    proxy = await stack.proxy(worker, reuse=NO_REUSE)
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.facts.has_priority and watched.facts.num_blocks)
    watched.facts = replace(watched.facts, has_plugin=True)
    theirs = {"kv_transfer_params": {"helium": {"pin": "mine"}, "other": 1}}
    for i in range(3):
        await proxy.client.post(CHAT, json=body(ROLE, words(3, i), "critic", str(i), stream=True, **theirs))
    await planned(proxy)
    await proxy.client.post(CHAT, json=body(ROLE, "x", "critic", "y", stream=True, **theirs))
    sent = [s.body.get("kv_transfer_params") for s in worker.seen if s.path == CHAT]
    assert sent[:3] == [{"other": 1}] * 3
    assert sent[3]["other"] == 1
    assert sent[3]["helium"]["pin"].startswith("critic@")
    assert sent[3]["helium"]["tokens"] % 16 == 0


async def test_a_refused_pin_costs_nothing(stack: Stack) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048, pin_budget=0.0)
    proxy = await stack.proxy(engine, reuse=NO_REUSE)
    await probed(proxy)
    (worker,) = proxy.services.pool.all()
    worker.facts = replace(worker.facts, pin_budget_blocks=100)  # as it says; then it has changed its mind
    await batch(proxy, 1000)
    proxy.services.ahead._tick()
    worker.facts = replace(worker.facts, pin_budget_blocks=100)
    proxy.services.ahead._tick()
    refused = metrics.DIRECTIVES.labels("pin", "error")._value.get()
    assert len(await batch(proxy, 2000)) == 3
    assert metrics.DIRECTIVES.labels("pin", "error")._value.get() == refused + 1
    assert proxy.services.dispatcher.state.workers[worker.id].residency.pinned == 0


async def test_pins_are_renewed_on_idle_capacity_and_given_back_when_cold(stack: Stack) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    proxy = await stack.proxy(engine, reuse=NO_REUSE, directives={"pin_ttl_s": 3.0, "prewarm": False})
    await probed(proxy)
    (worker,) = proxy.services.pool.all()
    await batch(proxy, 1000)
    await planned(proxy)
    renewed = metrics.DIRECTIVES.labels("renew", "ok")._value.get()
    await batch(proxy, 2000)
    site = proxy.services.ahead._sites.get(worker.id)
    assert site is not None
    await until(lambda: metrics.DIRECTIVES.labels("renew", "ok")._value.get() > renewed, within=6)
    await until(lambda: worker.facts.pinned_blocks)
    proxy.services.ahead._prefixes = Prefixes()
    await until(lambda: worker.facts.pinned_blocks == 0, within=6)
    assert not site.pins.planned
    assert proxy.services.dispatcher.state.workers[worker.id].residency.pinned == 0


async def test_without_the_plugin_a_lost_prefix_is_prefilled_again_when_the_worker_idles(stack: Stack) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    proxy = await stack.proxy(engine, reuse=NO_REUSE, pool={"probe": False})
    (worker,) = proxy.services.pool.all()
    static = (await batch(proxy, 1000))[-1]
    await planned(proxy)
    lost = metrics.PREFIXES_LOST.labels(worker.id)
    before, calls = lost._value.get(), metrics.PREWARM_TOKENS.labels("static")._value.get()
    proxy.services.ahead._tick()
    await flood(proxy, 5 * 256, 7000)
    await until(lambda: metrics.PREWARM_TOKENS.labels("static")._value.get() > calls, within=5)
    assert lost._value.get() >= before
    assert await cached(proxy, body(ROLE, "And now?", "critic", "last")) == static
    text = (await proxy.client.get("/metrics")).text
    assert 'helium_calls_total{fate="computed",model="demo",node="critic"' in text
    assert proxy.services.dispatcher.statistics().running == 0


async def test_a_prefix_that_never_becomes_resident_is_tried_ever_more_seldom(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    proxy = await stack.proxy(engine, reuse=NO_REUSE, pool={"probe": False}, directives={"lookahead": False})
    (worker,) = proxy.services.pool.all()
    ahead, residency = proxy.services.ahead, proxy.services.dispatcher.state.workers[worker.id].residency
    await batch(proxy, 1000)
    await planned(proxy)
    start = now = ahead._clock()
    tried: list[float] = []
    ask = ahead._prewarmer.ask

    async def fail(*_: Any) -> None:
        tried.append(now - start)
        if len(tried) % 2:
            raise RuntimeError("no answer that can be read")

    monkeypatch.setattr(ahead._prewarmer, "ask", fail)
    monkeypatch.setattr(ahead, "_clock", lambda: now)  # which stops its own loop, too

    async def seconds(count: int) -> None:
        nonlocal now
        for _ in range(count):
            ahead._tick()
            await until(lambda: all(site.prewarm is None for site in ahead._sites))
            now += 1.0

    residency.clear()
    await seconds(61)
    assert tried == [0, 4, 12, 28, 60]
    monkeypatch.setattr(ahead._prewarmer, "ask", ask)
    await seconds(64 + 2)
    assert residency.match(next(iter(ahead._sites)).pins.planned.popitem()[1].chain), "and it is tried all the same"
    await seconds(128)
    assert not any(site.later for site in ahead._sites), "what has become resident has no past"


@pytest.mark.parametrize("waiting", ["review", "another"])
async def test_pins_give_way_to_their_own_workflow_s_calls_alone(stack: Stack, waiting: str) -> None:
    """While calls wait for room, pins are given back if the calls are of the workflow that they are there for."""
    gate = asyncio.Event()
    gate.set()

    async def behind_the_gate(seen: Seen) -> None:
        await gate.wait()
        await answer(seen)

    worker = await stack.fake(kv_blocks=1000, always=behind_the_gate)
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    directives = {"prewarm": False, "lookahead": False}
    proxy = await stack.proxy(worker, reuse=NO_REUSE, dispatch={"max_running": 1}, directives=directives)
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.facts.has_priority and watched.facts.num_blocks)
    watched.facts = replace(watched.facts, has_plugin=True)

    async def call(run: str, **fields: str) -> None:
        asked = body(ROLE, run, "critic", run, stream=True, helium=fields)
        assert (await proxy.client.post(CHAT, json=asked)).status_code == 200

    for name in "abc":
        await call(name)
    await planned(proxy)
    await call("d")
    residency = proxy.services.dispatcher.state.workers[watched.id].residency
    assert residency.pinned > 0

    gate.clear()
    calls = [asyncio.create_task(call(name, workflow=waiting)) for name in "efg"]
    await until(lambda: proxy.services.dispatcher.statistics().queued == 2)
    proxy.services.ahead._tick()
    gate.set()
    await asyncio.gather(*calls)
    told = [(s.body.get("kv_transfer_params") or {}).get("helium", {}) for s in worker.seen if s.path == CHAT]
    if waiting == "review":
        assert [sorted(directive) for directive in told[4:]] == [[], ["unpin"], []]
        assert residency.pinned == 0
        proxy.services.ahead._tick()
        await call("h")
        assert residency.pinned > 0, "once nobody waits it is pinned again"
    else:
        assert not any("unpin" in directive for directive in told)
        assert residency.pinned > 0
