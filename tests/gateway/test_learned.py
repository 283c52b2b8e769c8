"""What the proxy learns of its workers, from probes and KV events."""

from __future__ import annotations

import asyncio
import random
import socket
from unittest.mock import AsyncMock

import pytest
from serving import CHAT, Engine, Proxy, Seen, Stack, answer, chat, http_client, until

from helium_proxy import metrics
from helium_proxy.gateway.events import EventFeeds
from helium_proxy.residency.kv_book import BlockView
from helium_proxy.residency.kv_events import EventSource
from helium_proxy.workers.probe import Probe

from .reviews import probed, words

ANYWHERE = "tcp://127.0.0.1:0"


async def test_a_worker_is_asked_for_what_it_can_do(stack: Stack) -> None:
    engine = await stack.engine(policy="priority")
    proxy = await stack.proxy(engine)
    await probed(proxy)
    (worker,) = proxy.services.pool.all()
    assert worker.facts.has_priority
    assert (await proxy.chat(helium={"priority": 3})).status_code == 200


async def test_a_worker_that_comes_up_idle_is_timed(stack: Stack) -> None:
    async def work(seen: Seen) -> None:
        tokens = len(str(seen.body["prompt"]).split())
        await asyncio.sleep(0.0005 * tokens + 0.01 * seen.body["max_tokens"])
        await seen.json({"choices": [], "usage": {"prompt_tokens": tokens}})

    worker = await stack.fake(always=work)
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    proxy = await stack.proxy(worker)
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.facts.alone_s is not None)
    assert watched.facts.alone_s is not None
    prefill_token_s, step_s = watched.facts.alone_s
    assert 0.0001 < prefill_token_s < step_s < 0.1
    rates = proxy.services.dispatcher.state.workers[watched.id].rates
    assert (rates.stall_s, rates.bare_step_s) == watched.facts.alone_s
    prompts = [s.body["prompt"] for s in worker.seen if s.body["prompt"] != "."]
    assert len(set(prompts)) == len(prompts) == 2, "nothing of them is cached"


async def test_where_a_short_prompt_takes_no_longer_than_a_step_a_longer_one_is_timed(stack: Stack) -> None:
    async def work(seen: Seen) -> None:
        tokens = len(str(seen.body["prompt"]).split())
        await asyncio.sleep(max(0.02, 0.0001 * tokens) + 0.02 * (seen.body["max_tokens"] - 1))
        await seen.json({"choices": [], "usage": {"prompt_tokens": tokens}})

    worker = await stack.fake(always=work)
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    proxy = await stack.proxy(worker)
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.facts.alone_s is not None)
    lengths = [len(s.body["prompt"].split()) for s in worker.seen if s.body["prompt"] != "."]
    assert lengths == [96, 96, 768, 768]


async def test_a_worker_that_was_not_alone_is_timed_another_time(stack: Stack) -> None:
    alone = False

    async def work(seen: Seen) -> None:
        watched.sent += not alone  # as if a call had been sent meanwhile
        tokens = len(str(seen.body["prompt"]).split())
        await asyncio.sleep(0.0005 * tokens + 0.005 * seen.body["max_tokens"])
        await seen.json({"choices": [], "usage": {"prompt_tokens": tokens}})

    worker = await stack.fake(always=work)
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    proxy = await stack.proxy(worker, pool={"probe": False})
    (watched,) = proxy.services.pool.all()
    probe = Probe(proxy.services.client, enabled=True, calibrate=True)
    await probe.learn(watched)
    await probe.time_alone(watched)
    assert watched.facts.alone_s is None
    alone = True
    await probe.time_alone(watched)
    assert watched.facts.alone_s is not None


async def test_a_worker_is_not_timed_where_that_is_turned_off(stack: Stack) -> None:
    engine = await stack.engine(policy="priority")
    proxy = await stack.proxy(engine, pool={"calibrate": False})
    await probed(proxy)
    (worker,) = proxy.services.pool.all()
    assert worker.facts.has_priority
    assert worker.facts.alone_s is None


async def test_an_engine_that_refuses_priorities_is_sent_none(stack: Stack) -> None:
    async def refuse(seen: Seen) -> None:
        if "priority" in seen.body:
            await seen.json({"error": {"message": "Priority scheduling is not enabled"}}, 400)
        else:
            await answer(seen)

    worker = await stack.fake(always=refuse)
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    proxy = await stack.proxy(worker)
    await until(lambda: len(worker.seen) >= 2)
    assert (await proxy.chat()).status_code == 200
    assert [s.path for s in worker.seen[:2]] == ["/v1/completions"] * 2


async def test_other_engines_are_not_asked(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    await proxy.chat()
    assert [s.path for s in worker.seen] == ["/v1/chat/completions"]
    (watched,) = proxy.services.pool.all()
    assert not watched.facts.has_priority


async def test_a_refusal_teaches_nothing_and_breaks_nothing(stack: Stack) -> None:
    async def refuse(seen: Seen) -> None:
        await seen.json({"error": {"message": "The model does not support Completions API"}}, 400)

    worker = await stack.fake()
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    worker.always = refuse
    proxy = await stack.proxy(worker)
    await until(lambda: worker.seen)
    assert worker.seen[0].body["priority"] == 1
    (watched,) = proxy.services.pool.all()
    assert (watched.state, watched.facts.has_priority, watched.facts.has_plugin) == ("up", False, False)
    assert [s.path for s in worker.seen].count("/v1/completions") == 1


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_worker_that_was_too_busy_to_say_is_asked_again(stack: Stack, status: int) -> None:
    worker = await stack.fake()
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    worker.then = [lambda seen: seen.json({"error": {"message": "not now"}}, status)] * 2
    proxy = await stack.proxy(worker, pool={"metrics_interval_s": 0.02})
    (watched,) = proxy.services.pool.all()
    for blocks in (100, 200):
        await until(lambda: len(worker.seen) == blocks // 100)  # noqa: B023 -- called at once
        worker.kv_blocks = blocks  # a change
    await until(lambda: watched.facts.has_priority)


async def test_a_restarted_worker_is_asked_again(stack: Stack) -> None:
    worker = await stack.fake()
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    worker.prompt_tokens = 100
    proxy = await stack.proxy(worker, pool={"metrics_interval_s": 0.02})
    (watched,) = proxy.services.pool.all()
    await until(lambda: watched.facts.has_priority and watched.facts.prompt_tokens == 100)

    async def refuse(seen: Seen) -> None:
        await seen.json({"error": {"message": "Priority scheduling is not enabled"}}, 400)

    worker.always = refuse
    worker.prompt_tokens = 0
    await until(lambda: not watched.facts.has_priority)
    assert watched.epoch == 2


async def test_the_mirror_is_what_the_engine_s_events_say(stack: Stack) -> None:
    """Calls of shared prefixes through a KV cache a fraction of their size: what was predicted is what was found."""
    engine = await stack.engine(num_blocks=128, max_model_len=1024, kv_events=ANYWHERE, kv_events_replay=ANYWHERE)
    proxy = await stack.proxy(engine, reuse={"enabled": False, "coalesce": False})
    (worker,) = proxy.services.pool.all()
    await until(lambda: proxy.services.events.followed(worker.id))
    mirror = proxy.services.dispatcher.state.workers[worker.id].residency
    chance = random.Random(7)
    prefixes = [words(60, i) for i in range(12)]
    errors, hits = [], 0
    for turn in range(60):
        if turn % 10 == 9:  # another client of the engine, of whom only its events tell
            await direct(proxy, engine, words(80, 1000 + turn))
        text = chance.choice(prefixes) + f" {turn}"
        response = await proxy.chat(text, max_tokens=4, ignore_eos=True, helium={"run": f"r{turn}"})
        actual = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        run = (await proxy.client.get(f"/helium/runs/r{turn}")).json()
        predicted = run["nodes"][0]["predicted_cached_tokens"]
        errors.append(abs(predicted - actual))
        hits += actual > 0
    assert hits > 10, "there was something to predict"
    assert sum(e <= 16 for e in errors) >= 0.95 * len(errors), errors
    assert mirror.statistics().free <= 128


async def direct(proxy: Proxy, engine: Engine, text: str) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    response = await proxy.client.post(f"{engine.url}/v1/chat/completions", json=body)
    assert response.status_code == 200


async def test_a_reset_cache_is_noticed(stack: Stack) -> None:
    engine = await stack.engine(kv_events=ANYWHERE, kv_events_replay=ANYWHERE)
    proxy = await stack.proxy(engine, pool={"calibrate": False})
    (worker,) = proxy.services.pool.all()
    await until(lambda: proxy.services.events.followed(worker.id))
    mirror = proxy.services.dispatcher.state.workers[worker.id].residency
    await proxy.chat(words(100, 1))
    await until(lambda: mirror.statistics().free > 10)
    assert (await proxy.client.post(f"{engine.url}/reset_prefix_cache")).status_code == 200
    await proxy.chat("short")  # the engine's next step tells
    await until(lambda: mirror.statistics().free < 10)


@pytest.mark.parametrize("why", ["late", "other blocks"])
async def test_events_that_do_not_say_all_are_not_followed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """What the engine held before anybody listened is in none of them, nor can what follows it be told from them."""
    if why == "other blocks":
        monkeypatch.setattr("helium_proxy.gateway.events.BlockView", lambda model, size: BlockView(model, size // 2))
    engine = await stack.engine(kv_events=ANYWHERE, kv_events_replay=None if why == "late" else ANYWHERE)
    shared = words(60, 1)
    async with http_client(engine.url) as client:
        assert (await client.post(CHAT, json=chat(shared, max_tokens=1))).status_code == 200
    proxy = await stack.proxy(engine, reuse={"enabled": False, "coalesce": False}, pool={"probe": False})
    (worker,) = proxy.services.pool.all()
    await until(lambda: proxy.services.events.followed(worker.id))
    residency = proxy.services.dispatcher.state.workers[worker.id].residency

    def heard() -> float:
        labels = {"worker": worker.id, "kind": "stored"}
        return metrics.REGISTRY.get_sample_value("helium_kv_events_total", labels) or 0.0

    before = heard()
    for run in ("first", "again"):
        await proxy.chat(f"{shared} {words(20, 2)}", max_tokens=1, helium={"run": run})
        await until(lambda: heard() > before)
        for _ in range(3):
            proxy.services.events.tick()
    run = (await proxy.client.get("/helium/runs/again")).json()
    assert run["nodes"][0]["predicted_cached_tokens"] == run["nodes"][0]["cached_tokens"] > 100
    assert not residency._following
    if why == "late":
        assert (await proxy.client.post(f"{engine.url}/reset_prefix_cache")).status_code == 200
        await proxy.chat("short")
        await until(lambda: residency._following and residency.statistics().free < 10)


async def test_following_ends_with_the_worker(stack: Stack) -> None:
    engine = await stack.engine(kv_events=ANYWHERE, kv_events_replay=ANYWHERE)
    proxy = await stack.proxy(engine)
    (worker,) = proxy.services.pool.all()
    await until(lambda: proxy.services.events.followed(worker.id))
    await proxy.client.delete(f"/helium/workers/{worker.id}")
    await until(lambda: not proxy.services.events.followed(worker.id))


async def test_passthrough_asks_nothing_and_follows_nobody(stack: Stack) -> None:
    engine = await stack.engine(policy="priority", kv_events=ANYWHERE)
    proxy = await stack.proxy(engine, mode="passthrough")
    await proxy.chat()
    (worker,) = proxy.services.pool.all()
    assert not worker.facts.has_priority
    assert not proxy.services.events.followed(worker.id)


async def test_a_worker_whose_events_cannot_be_heard_is_mirrored_by_guessing(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its list of endpoints is answered, and nobody listens there: a firewall between containers, say."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        source = EventSource(0, f"tcp://127.0.0.1:{silent.getsockname()[1]}", None, "kv-events")
        monkeypatch.setattr(EventFeeds, "_sources", AsyncMock(return_value=(source,)))
        proxy = await stack.proxy(await stack.engine(), reuse={"enabled": False, "coalesce": False})
        (worker,) = proxy.services.pool.all()
        await until(lambda: proxy.services.events.followed(worker.id))
        await proxy.chat(words(100, 1), helium={"run": "first"})
        for _ in range(3):
            proxy.services.events.tick()
        await proxy.chat(words(100, 1), helium={"run": "again"})
        run = (await proxy.client.get("/helium/runs/again")).json()
        assert run["nodes"][0]["predicted_cached_tokens"] == run["nodes"][0]["cached_tokens"] > 0
        assert proxy.services.dispatcher.state.workers[worker.id].residency._due == ([], [])


async def test_what_a_worker_leaves_out_when_nothing_was_cached_counts_as_nothing(stack: Stack) -> None:
    """vLLM gives no details of a prompt of which nothing was cached."""
    told = iter([7, None])

    async def details(seen: Seen) -> None:
        body = seen.completion()
        cached = next(told)
        body["usage"] = {**body["usage"], "prompt_tokens_details": cached and {"cached_tokens": cached}}
        await seen.json(body)

    proxy = await stack.proxy(await stack.fake(always=details))
    for run in ("first", "second"):
        await proxy.chat(run, helium={"run": run})
    nodes = [(await proxy.client.get(f"/helium/runs/{run}")).json()["nodes"][0] for run in ("first", "second")]
    assert [node["cached_tokens"] for node in nodes] == [7, 0]


async def test_plans_are_planned_with_the_lengths_that_earlier_runs_have_shown(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    nodes = [{"id": "a", "prompt": "{{inputs.q}}"}, {"id": "b", "prompt": "{{a}}"}]
    plan = {"workflow": "known", "model": "demo", "nodes": nodes, "inputs": [{"q": "one"}, {"q": "two"}]}

    async def lengths() -> set[int]:
        answer = await proxy.client.post("/v1/workflows/explain", json=plan, params={"format": "json"})
        return {operator["predicted_output_tokens"] for operator in answer.json()["operators"]}

    assert await lengths() == {256}
    job = (await proxy.client.post("/v1/workflows", json=plan)).json()
    done = await proxy.client.get(f"/v1/workflows/{job['id']}", params={"wait_s": 10})
    assert done.json()["status"] == "completed"
    assert await lengths() == {2}
    plan["workflow"] = "another"
    assert await lengths() == {256}
