"""The embedded engine's KV events, mirrored: the view knows what the engine will find cached. (`tests/vllm` has the
same with a real engine.)"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import httpx
import uvicorn

from helium_proxy.engine import EngineConfig, create_app
from helium_proxy.residency.kv_book import BlockView, Event, Removed
from helium_proxy.residency.kv_events import KvEventSubscriber, event_sources

BLOCK = 16


@contextlib.asynccontextmanager
async def serving(config: EngineConfig) -> Any:
    server = uvicorn.Server(uvicorn.Config(create_app(config), port=0, log_level="warning", access_log=False))
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.001)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        server.should_exit = True
        await task


async def test_an_embedded_engines_cache_is_mirrored_exactly() -> None:
    chance = random.Random(3)
    anywhere = "tcp://127.0.0.1:0"
    config = EngineConfig(
        block_size=BLOCK, num_blocks=48, max_model_len=512, kv_events=anywhere, kv_events_replay=anywhere
    )
    prefixes = [[chance.randrange(10, 8000) for _ in range(BLOCK * 8)] for _ in range(10)]
    view, seen = BlockView("demo", BLOCK), list[Event]()

    def take(worker: str, event: Event) -> None:
        seen.append(event)
        view.apply(event)

    async with serving(config) as client:

        async def ask(tokens: list[int]) -> int:
            body = {"model": "demo", "prompt": tokens, "max_tokens": 1, "temperature": 0}
            usage = (await client.post("/v1/completions", json=body)).raise_for_status().json()["usage"]
            return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

        (source,) = event_sources((await client.get("/kv_event_sources")).json(), str(client.base_url))
        await ask(prefixes[0])  # before anyone subscribes
        subscriber = KvEventSubscriber("w1", source, take)
        task = asyncio.create_task(subscriber.run())
        predicted, actual = [], []
        try:
            for _ in range(40):
                kept = chance.randrange(1, 9) * BLOCK
                tokens = chance.choice(prefixes)[:kept] + [chance.randrange(10, 8000) for _ in range(20)]
                probe = [chance.randrange(10, 8000) for _ in range(BLOCK)]
                await ask([*probe, 1])  # its block's event is the last: when it is here, so are all before it
                async with asyncio.timeout(10):
                    while not view.resident_tokens(probe):
                        await asyncio.sleep(0.001)
                predicted.append(view.resident_tokens(tokens) * BLOCK)
                actual.append(await ask(tokens))
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    assert predicted == actual
    assert sum(count > 0 for count in actual) > 5, "and there was something to predict"
    assert any(isinstance(event, Removed) for event in seen), "it evicted"
    assert subscriber.book.statistics().undecodable == 0
