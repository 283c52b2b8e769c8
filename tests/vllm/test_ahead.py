"""Pins, events and lookahead through the proxy, on a real engine with the plugin and KV events.

An engine of 80 blocks of 32 tokens; the budget (30%) holds the roles of three nodes.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import PIN_CONNECTOR, VllmEngine

from helium_proxy.local import free_port

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving import CHAT, Proxy, Stack, until

pytestmark = pytest.mark.vllm

BLOCK, BLOCKS = 32, 80
NODES = ("author", "critic", "editor")
DIRECTIVES = {"min_tokens": 2 * BLOCK, "min_think_s": 0.1}


@pytest.fixture(scope="module")
def engine(vllm_env: None) -> Iterator[VllmEngine]:
    extra = ("--max-model-len", "1024", "--block-size", str(BLOCK))
    with VllmEngine(
        free_port(), blocks=BLOCKS, connector=PIN_CONNECTOR, kv_events=True, extra_args=extra, core="nobind"
    ) as made:
        yield made


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    made = Stack()
    yield made
    await made.close()


async def start(stack: Stack, engine: VllmEngine, events: bool = True, **directives: Any) -> Proxy:
    proxy = await stack.proxy(
        engine.url,
        reuse={"enabled": False, "coalesce": False},
        pool={"kv_events": events},
        directives={**DIRECTIVES, **directives},
    )
    (worker,) = proxy.services.pool.all()
    await until(lambda: worker.facts.has_plugin, what="the plugin found")
    assert worker.facts.has_priority
    await until(lambda: proxy.services.tokenizers.get("demo"), what="a tokenizer")
    if events:
        await until(lambda: proxy.services.events.followed(worker.id), what="events followed")
    return proxy


WORDS = ("alpha", "parse", "value", "token", "index", "cache", "error", "model")


def words(count: int, seed: str) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(count))


def body(family: str, node: str, run: str, **helium: Any) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": words(110, f"{family} {node}")},
        {"role": "user", "content": words(6, f"{family} {node} {run}")},
    ]
    helium = {"workflow": family, "node": node, "run": f"{family}-{run}", "parents": [], **helium}
    return {
        "model": "demo",
        "messages": messages,
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "helium": helium,
    }


async def ask(proxy: Proxy, asked: dict[str, Any]) -> tuple[int, float]:
    """Cached tokens, and seconds (to the first token, which is the only one)."""
    began = time.monotonic()
    response = await proxy.client.post(CHAT, json=asked)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0, time.monotonic() - began


async def flood(proxy: Proxy, blocks: int, seed: str) -> None:
    """Unrelated prompts of 16 blocks, so many blocks in all, as they would come from elsewhere: four at a time."""
    chance = random.Random(seed)

    async def one() -> None:
        prompt = [chance.randrange(300, 8000) for _ in range(16 * BLOCK - 1)]
        asked = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0}
        assert (await proxy.client.post("/v1/completions", json=asked, timeout=120)).status_code == 200

    limit = asyncio.Semaphore(4)

    async def bounded() -> None:
        async with limit:
            await one()

    await asyncio.gather(*(bounded() for _ in range(-(-blocks // 16))))


async def test_two_batches_with_a_flood_between_them(stack: Stack, engine: VllmEngine) -> None:
    """A workflow's static prefixes hit whole in the second batch with pins, and a control's not at all."""

    async def first(proxy: Proxy, family: str) -> list[int]:
        """The first batch; returns what is static in each node's prompt."""
        static = []
        for run in range(3):
            static = [(await ask(proxy, body(family, node, f"first-{run}")))[0] for node in NODES]
            await asyncio.sleep(1.5)  # a tick, in which the pins are planned
        return static

    without = await start(stack, engine, pins=False, prewarm=False, lookahead=False)
    proxy = await start(stack, engine, prewarm=False, lookahead=False)
    control_static, static = await first(without, "control"), await first(proxy, "pinned")
    assert min(static + control_static) >= 3 * BLOCK
    await flood(without, 5 * BLOCKS, "flood")
    control = [await ask(without, body("control", node, "second")) for node in NODES]
    pinned = [await ask(proxy, body("pinned", node, "second")) for node in NODES]
    assert [cached for cached, _ in control] == [0, 0, 0]
    assert [cached for cached, _ in pinned] == static
    slow, fast = ([seconds for _, seconds in batch] for batch in (control, pinned))
    ratio = statistics.median(slow) / statistics.median(fast)
    print(f"\nsecond batch, time to first token: control / pinned = {ratio:.1f}")
    (worker,) = proxy.services.pool.all()
    await until(lambda: worker.facts.pinned_blocks)
    assert worker.facts.pinned_blocks <= (worker.facts.pin_budget_blocks or 0)


@pytest.mark.parametrize(("events", "share"), [(True, 0.95), (False, 0.85)])
async def test_cached_tokens_are_predicted(stack: Stack, engine: VllmEngine, events: bool, share: float) -> None:
    """Runs of calls that share prefixes, concurrently, on a cache that holds a third of their prefixes."""
    proxy = await start(stack, engine, events=events, pins=False, prewarm=False, lookahead=False)
    family = f"events-{events}"
    chance = random.Random(5)
    answers: list[tuple[str, int]] = []

    async def run(name: str) -> None:
        history: list[dict[str, Any]] = []
        for turn, node in enumerate(NODES):
            asked = body(f"{family}-{chance.randrange(8)}", node, name)
            asked["messages"][1:1] = history
            asked["helium"]["run"] = name
            asked["max_tokens"] = 4
            response = await proxy.client.post(CHAT, json=asked, timeout=120)
            usage = response.json()["usage"]
            answers.append((response.json()["id"], (usage.get("prompt_tokens_details") or {})["cached_tokens"] or 0))
            if turn == 0:
                history = [{"role": "user", "content": words(60, name)}]

    for group in range(3):
        await asyncio.gather(*(run(f"{family}-{group}-{i}") for i in range(3)))
    predicted: dict[str, int] = {}
    for group in range(3):
        for i in range(3):
            told = (await proxy.client.get(f"/helium/runs/{family}-{group}-{i}")).json()
            predicted |= {n["call"]: n["predicted_cached_tokens"] for n in told["nodes"]}
    close = [abs(predicted[call] - cached) <= BLOCK for call, cached in answers]
    hits = sum(cached > 0 for _, cached in answers)
    print(f"\nevents={events}: {sum(close)} of {len(close)} predicted within a block, {hits} had something cached")
    assert len(close) == 27
    assert hits >= 3, "there was something to predict (how much depends on who comes first)"
    assert sum(close) >= share * len(close)


async def test_lookahead_prefills_while_the_client_thinks(stack: Stack, engine: VllmEngine) -> None:
    async def after_a_flood(proxy: Proxy, family: str) -> tuple[int, int, float]:
        async def steps(run: str, think_s: float) -> tuple[int, float]:
            await ask(proxy, body(family, "author", run))
            await asyncio.sleep(think_s)
            return await ask(proxy, body(family, "critic", run, parents=["author"], final=True))

        for i in range(2):
            await steps(f"learn-{i}", 0.3)
        static, _ = await steps("learn-2", 0.3)
        await flood(proxy, 2 * BLOCKS, family)
        return static, *await steps("after", 1.5)

    without = await start(stack, engine, pins=False, lookahead=False)
    _, control, slow = await after_a_flood(without, "alone")
    proxy = await start(stack, engine, pins=False)
    static, found, fast = await after_a_flood(proxy, "ahead")
    assert control == 0
    assert found == static >= 3 * BLOCK
    print(f"\nfirst call after the think time: without / with lookahead = {slow / fast:.1f}")
