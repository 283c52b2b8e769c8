"""The proxy answers as the engine does: every case of the table, directly and through the proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest
import pytest_asyncio
from conformance import CASES, Case, accepts, ask
from serving import Engine, Proxy, Stack, http_client

in_one_loop = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Rig:
    """One engine behind three proxies: everything on but stored answers; everything on; and passthrough."""

    engine: Engine
    relaying: Proxy
    caching: Proxy
    passthrough: Proxy
    client: httpx.AsyncClient


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def rig() -> AsyncIterator[Rig]:
    stack = Stack()
    # Blocks larger than the prompts: no answer depends on what the engine's cache held.
    engine = await stack.engine(block_size=128, num_blocks=512, max_model_len=4096, policy="priority")
    relaying = await stack.proxy(engine, reuse={"enabled": False})
    caching = await stack.proxy(engine)
    passthrough = await stack.proxy(engine, mode="passthrough")
    async with http_client() as client:
        yield Rig(engine, relaying, caching, passthrough, client)
    await stack.close()


@in_one_loop
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_answers_are_equal(rig: Rig, case: Case) -> None:
    direct = await ask(rig.client, rig.engine.url, case)
    assert accepts(case, direct.status), direct.raw[:500]
    for proxy in (rig.relaying, rig.passthrough):
        proxied = await ask(rig.client, proxy.url, case)
        assert proxied.normal() == direct.normal()


@in_one_loop
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_answers_from_the_cache_are_equal(rig: Rig, case: Case) -> None:
    """Twice through the caching proxy. A replayed stream need not be cut where the engine cut it, and fields that
    are null may be missing."""
    direct = await ask(rig.client, rig.engine.url, case)
    for _ in range(2):
        proxied = await ask(rig.client, rig.caching.url, case)
        assert proxied.gist() == direct.gist()


def test_the_table_is_as_large_as_it_claims() -> None:
    assert len(CASES) >= 100
    assert len({c.name for c in CASES}) == len(CASES)
