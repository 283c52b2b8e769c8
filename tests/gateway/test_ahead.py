"""What the proxy learns of its workers and does ahead of need, in front of embedded engines."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
from serving import CHAT, Engine, Proxy, Seen, Stack, answer, until

from helium_proxy import metrics
from helium_proxy.residency.directives import Prefixes

ANYWHERE = "tcp://127.0.0.1:0"


def words(count: int, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(f"{chance.randrange(10**6):06d}" for _ in range(count))


async def probed(proxy: Proxy) -> None:
    await until(lambda: all(w.facts.has_plugin for w in proxy.services.pool), what="probed")


async def test_a_worker_is_asked_for_what_it_can_do(stack: Stack) -> None:
    engine = await stack.engine(policy="priority")
    proxy = await stack.proxy(engine)
    await probed(proxy)
    (worker,) = proxy.services.pool.all()
    assert worker.facts.has_priority
    assert (await proxy.chat(helium={"priority": 3})).status_code == 200


async def test_an_engine_that_refuses_priorities_is_sent_none(stack: Stack) -> None:
    async def refuse(seen: Seen) -> None:
        if "priority" in seen.body:
            await seen.json({"error": {"message": "Priority scheduling is not enabled"}}, 400)
        else:
            await answer(seen)

    worker = await stack.fake(always=refuse)
    worker.card = lambda model: {"id": model, "owned_by": "vllm"}  # type: ignore[method-assign]
    proxy = await stack.proxy(worker)
    await until(lambda: len(worker.seen) == 2)
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
    proxy = await stack.proxy(engine)
    (worker,) = proxy.services.pool.all()
    await until(lambda: proxy.services.events.followed(worker.id))
    mirror = proxy.services.dispatcher.state.workers[worker.id].residency
    await proxy.chat(words(100, 1))
    await until(lambda: mirror.statistics().free > 10)
    assert (await proxy.client.post(f"{engine.url}/reset_prefix_cache")).status_code == 200
    await proxy.chat("short")  # the engine's next step tells
    await until(lambda: mirror.statistics().free < 10)


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


# -- pins


ROLE = "You are a careful reviewer. " + words(200, 99)
NO_REUSE = {"enabled": False, "coalesce": False}


def body(role: str, question: str, node: str, run: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": role}, {"role": "user", "content": question}]
    helium = {"workflow": "review", "node": node, "run": run, **fields.pop("helium", {})}
    return {"model": "demo", "messages": messages, "max_tokens": 2, "temperature": 0, "helium": helium, **fields}


async def cached(proxy: Proxy, asked: dict[str, Any]) -> int:
    """Prompt tokens that the engine found cached."""
    response = await proxy.client.post(CHAT, json=asked)
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def flood(proxy: Proxy, blocks: int, seed: int) -> None:
    """Unrelated calls that fill so many blocks."""
    for i in range(blocks // 40):
        assert (await proxy.chat(words(100, seed + i), max_tokens=1)).status_code == 200


async def batch(proxy: Proxy, seed: int, runs: int = 3, **fields: Any) -> list[int]:
    return [
        await cached(proxy, body(ROLE, words(3, seed + i), "critic", f"{seed}-{i}", **fields)) for i in range(runs)
    ]


async def planned(proxy: Proxy) -> None:
    ahead = proxy.services.ahead
    await until(lambda: all(site.pins.planned for site in ahead._sites) and len(ahead._sites), what="a plan")


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


# -- lookahead


async def two_steps(proxy: Proxy, run: str, think_s: float, role: str = ROLE) -> int:
    """An author, a while of thinking, a critic; the critic's cached tokens."""
    await cached(proxy, body("You are an author.", words(5, hash(run) % 1000), "author", run))
    await asyncio.sleep(think_s)
    helium = {"parents": ["author"], "final": True}
    return await cached(proxy, body(role, words(5, hash(run) % 999), "critic", run, helium=helium))


@pytest.mark.parametrize("lookahead", [True, False])
async def test_the_next_call_s_prefix_is_there_when_it_comes(stack: Stack, lookahead: bool) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    directives = {"pins": False, "min_think_s": 0.05, "lookahead": lookahead}
    proxy = await stack.proxy(engine, reuse=NO_REUSE, directives=directives)
    used, wasted = (metrics.LOOKAHEAD.labels(r)._value.get() for r in ("used", "wasted"))
    for i in range(3):
        static = await two_steps(proxy, f"learn-{i}", 0.1)
    await flood(proxy, 5 * 256, 7000)
    calls = proxy.services.workflows.statistics().calls
    found = await two_steps(proxy, "after", 0.6)
    assert found == (static if lookahead else 0)
    assert metrics.LOOKAHEAD.labels("used")._value.get() == used + lookahead
    assert metrics.LOOKAHEAD.labels("wasted")._value.get() == wasted
    assert proxy.services.workflows.statistics().calls == calls + 2, "a prewarm is no call"


async def test_a_count_of_waiting_calls_that_may_have_been_ours_stops_nothing(stack: Stack) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    proxy = await stack.proxy(engine, reuse=NO_REUSE)
    (worker,) = proxy.services.pool.all()
    known = proxy.services.dispatcher.state.workers[worker.id]
    worker.facts = replace(worker.facts, waiting=1)  # read while a call of ours was on its way in
    assert proxy.services.ahead._sites.idle(worker, known)
    worker.foreign_waiting = 1
    assert not proxy.services.ahead._sites.idle(worker, known)


# -- lookahead through what a prompt is made of

DEBATERS = ("proposer", "opponent")


async def debate(proxy: Proxy, run: str, seed: int, think_s: float, changed: str = "") -> list[tuple[int, int]]:
    """Two rounds; of the second one's calls how many tokens were cached, and how many there were."""
    opening = f"The question of this debate:\n{words(60, seed)}"

    async def ask(node: str, messages: list[dict[str, str]], parents: list[str]) -> tuple[str, int, int]:
        helium = {"workflow": "debate", "node": node, "run": run, "parents": parents}
        asked = {"model": "demo", "messages": messages, "max_tokens": 96, "ignore_eos": True, "temperature": 0}
        response = await proxy.client.post(CHAT, json={**asked, "helium": helium})
        assert response.status_code == 200, response.text
        answer, usage = response.json(), response.json()["usage"]
        text = answer["choices"][0]["message"]["content"]
        return text, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    def start(name: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": f"You are the {name}."}, {"role": "user", "content": opening}]

    first = await asyncio.gather(*(ask(f"{name}_1", start(name), []) for name in DEBATERS))
    await asyncio.sleep(think_s)
    out = []
    for at, name in enumerate(DEBATERS):
        other = DEBATERS[1 - at]
        said = f"The {other} said:\n{changed or first[1 - at][0]}\n\nAnswer them."
        messages = [*start(name), {"role": "assistant", "content": first[at][0]}, {"role": "user", "content": said}]
        _, found, total = await ask(f"{name}_2", messages, [f"{name}_1" for name in DEBATERS])
        out.append((found, total))
    await proxy.client.delete(f"/helium/runs/{run}")
    return out


async def debating(stack: Stack, **directives: Any) -> Proxy:
    engine = await stack.engine(num_blocks=1024, max_model_len=2048)
    settings = {"pins": False, "prewarm": False, "min_think_s": 0.05, "min_tokens": 64, **directives}
    proxy = await stack.proxy(engine, reuse=NO_REUSE, directives=settings)
    await until(lambda: proxy.services.tokenizers.get("demo"))
    for seed in range(3):
        await debate(proxy, f"learn-{seed}", seed, 0.1)
    return proxy


async def test_replies_that_go_into_other_prompts_are_there_before_them(stack: Stack) -> None:
    proxy = await debating(stack)
    for found, total in await debate(proxy, "after", 77, 0.6):
        assert found == (total - 1) // 16 * 16, "all but the last block"


async def test_without_lookahead_replies_in_other_prompts_are_computed(stack: Stack) -> None:
    proxy = await debating(stack, lookahead=False)
    for found, total in await debate(proxy, "after", 77, 0.6):
        assert found < total - 96


async def test_a_prompt_made_otherwise_than_predicted_loses_nothing(stack: Stack) -> None:
    proxy = await debating(stack)
    wasted = metrics.LOOKAHEAD.labels("wasted")._value.get()
    for found, total in await debate(proxy, "after", 77, 0.6, changed=words(80, 5)):
        assert 96 < found < total - 96, "the conversation so far"
    ahead = proxy.services.ahead._lookahead
    ahead.tick(proxy.services.clock() + 1000)
    assert metrics.LOOKAHEAD.labels("wasted")._value.get() == wasted + 2
    assert not ahead._awaited


async def test_a_prewarm_gives_way_to_a_real_call(stack: Stack) -> None:
    gone = asyncio.Event()

    async def slow(seen: Seen) -> None:
        if seen.path == "/v1/completions":
            await seen.gone()
            gone.set()
        else:
            await seen.json({**seen.completion(), "usage": {"prompt_tokens": 2000, "completion_tokens": 2}})

    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    worker = await stack.fake(always=slow, kv_blocks=1000)
    proxy = await stack.proxy(worker, reuse=NO_REUSE, directives={"pins": False, "min_think_s": 0.02})
    services = proxy.services
    teacher = await stack.proxy(engine)
    await until(lambda: teacher.services.tokenizers.get("demo"))
    services.tokenizers._tokenizers["demo"] = teacher.services.tokenizers.get("demo")
    services.tokenizers._block_sizes["demo"] = 16

    async def run(name: str) -> None:
        await proxy.client.post(CHAT, json=body("You are an author.", name, "author", name))
        await asyncio.sleep(0.05)
        helium = {"parents": ["author"], "final": True}
        await proxy.client.post(CHAT, json=body(ROLE, name, "critic", name, helium=helium))

    for i in range(3):
        await run(f"learn-{i}")
    (known,) = services.dispatcher.state.workers.values()
    known.residency.clear()
    await proxy.client.post(CHAT, json=body("You are an author.", "x", "author", "x"))
    await until(lambda: worker.inside == 1, what="a prewarm")
    prewarm = worker.seen[-1]
    assert prewarm.body["max_tokens"] == 1
    assert len(prewarm.body["prompt"]) > 256
    skipped = metrics.LOOKAHEAD.labels("skipped")._value.get()
    await proxy.chat("something else")
    await asyncio.wait_for(gone.wait(), 5)

    async def forgotten() -> bool:  # it begins anew as long as the client may still think, and gives way again
        await proxy.chat("something else")
        return known.residency.used == 0

    await until(forgotten)
    assert metrics.LOOKAHEAD.labels("skipped")._value.get() >= skipped


async def test_passthrough_sends_nothing_ahead(stack: Stack) -> None:
    engine = await stack.engine(num_blocks=256, max_model_len=2048)
    proxy = await stack.proxy(engine, mode="passthrough")
    for i in range(3):
        await two_steps(proxy, f"r{i}", 0.05)
    proxy.services.ahead._tick()
    assert not len(proxy.services.ahead._sites)
    assert not len(proxy.services.ahead._prefixes)


async def test_a_failure_ahead_costs_no_answer(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await stack.engine()
    proxy = await stack.proxy(engine)
    failed = metrics.FAIL_OPEN.labels("directives")._value.get()

    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(proxy.services.ahead._prefixes, "learn", fail)
    assert (await proxy.chat(ROLE)).status_code == 200
    assert metrics.FAIL_OPEN.labels("directives")._value.get() == failed + 1
