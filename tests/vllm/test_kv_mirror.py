"""The KV events of a real engine, mirrored: what the view says is resident is what the engine then finds cached."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import urllib.request
from typing import Any

import pytest
from engines import VllmEngine

from helium_proxy.local import free_port
from helium_proxy.residency.kv_book import BlockView, Event, Removed
from helium_proxy.residency.kv_events import KvEventSubscriber, event_sources

BLOCK = 32  # the least on CPU
BLOCKS = 48


@pytest.mark.vllm
async def test_a_real_engines_cache_is_mirrored_exactly(vllm_env: None) -> None:
    """Random prompts with shared prefixes, salted and not, on an engine of few blocks that evicts all the time."""
    chance = random.Random(1)
    extra = ("--max-model-len", "512", "--block-size", str(BLOCK))
    with VllmEngine(free_port(), blocks=BLOCKS, kv_events=True, extra_args=extra) as engine:

        def ask(tokens: list[int], salt: str = "") -> int:
            """The cached tokens the engine reports for a prompt."""
            body: dict[str, Any] = {"model": "demo", "prompt": tokens, "max_tokens": 1, "temperature": 0}
            usage = engine.post("/v1/completions", {**body, "cache_salt": salt} if salt else body)["usage"]
            return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

        with urllib.request.urlopen(f"{engine.url}/kv_event_sources") as answer:
            (source,) = event_sources(json.load(answer), engine.url)
        view = BlockView("demo", BLOCK)
        seen: list[Event] = []

        def take(worker: str, event: Event) -> None:
            seen.append(event)
            view.apply(event)

        prefixes = [[chance.randrange(10, 8000) for _ in range(BLOCK * 6)] for _ in range(12)]
        await asyncio.to_thread(ask, prefixes[0])  # before anyone subscribes
        predicted, actual = [], []
        subscriber = KvEventSubscriber("w1", source, take, quiet_s=0.2)
        task = asyncio.create_task(subscriber.run())
        try:
            async with asyncio.timeout(20):
                while not seen:
                    await asyncio.sleep(0.01)
            for turn in range(45):
                salt = "s" if turn % 5 == 0 else ""
                kept = chance.randrange(1, 7) * BLOCK
                tokens = chance.choice(prefixes)[:kept] + [chance.randrange(10, 8000) for _ in range(20)]
                probe = [chance.randrange(10, 8000) for _ in range(BLOCK)]
                await asyncio.to_thread(ask, [*probe, 1])
                async with asyncio.timeout(20):  # its block's event comes after all the others
                    while not view.resident_tokens(probe):
                        await asyncio.sleep(0.005)
                # A prompt's last token is always computed, so a block that it ends is never a hit.
                reachable = (len(tokens) - 1) // BLOCK
                predicted.append(min(view.resident_tokens(tokens, salt), reachable) * BLOCK)
                actual.append(await asyncio.to_thread(ask, tokens, salt))
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    statistics = subscriber.book.statistics()
    assert predicted == actual
    assert sum(count > 0 for count in actual) > 10, "and there was something to predict"
    assert any(isinstance(event, Removed) for event in seen), "it evicted"
    assert statistics.blocks <= BLOCKS
    assert (statistics.gaps, statistics.resets, statistics.undecodable) == (0, 0, 0)
