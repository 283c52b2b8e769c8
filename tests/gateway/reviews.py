"""A workflow of reviews whose prompts begin alike, and calls that flood a cache: for tests of what is done ahead."""

from __future__ import annotations

import random
from typing import Any

from serving import CHAT, Proxy, until


def words(count: int, seed: int) -> str:
    chance = random.Random(seed)
    return " ".join(f"{chance.randrange(10**6):06d}" for _ in range(count))


async def probed(proxy: Proxy) -> None:
    await until(lambda: all(w.facts.has_plugin for w in proxy.services.pool), what="probed")


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
