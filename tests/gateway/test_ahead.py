"""What is sent ahead while the client thinks, in front of embedded engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from serving import CHAT, Proxy, Seen, Stack, until

from helium_proxy import metrics

from .reviews import NO_REUSE, ROLE, body, cached, flood, words

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
