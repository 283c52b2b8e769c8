"""The conformance table against real vLLM: directly and through the proxy the answers are equal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from conformance import CASES, Case, Reply, accepts, ask
from engines import EngineClient
from serving import Stack, http_client

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

Pairs = dict[str, tuple[Reply, Reply]]

# Greedy and seeded answers do not depend on the batch in float32, so that cases may run beside each other.
_AT_ONCE = 8


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pairs(vllm_engines: list[EngineClient]) -> AsyncIterator[Pairs]:
    """Every case asked directly and through a proxy that neither stores answers nor joins calls."""
    stack = Stack()
    engine = vllm_engines[0].url
    proxy = await stack.proxy(engine, reuse={"enabled": False, "coalesce": False})
    room = asyncio.Semaphore(_AT_ONCE)
    async with http_client() as client:
        client.timeout = 120  # type: ignore[assignment]

        async def both(case: Case) -> tuple[Reply, Reply]:
            async with room:
                return await ask(client, engine, case), await ask(client, proxy.url, case)

        answers = await asyncio.gather(*map(both, CASES))
    await stack.close()
    yield dict(zip((c.name for c in CASES), answers, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_answers_are_equal(pairs: Pairs, case: Case) -> None:
    direct, proxied = pairs[case.name]
    assert accepts(case, direct.status), direct.raw[:500]
    assert proxied.merged() == nearly(direct.merged())


def nearly(value: Any) -> Any:
    """`value`, whose log probabilities may differ in their last digits: they do with what is in the batch."""
    match value:
        case dict():
            return {key: nearly(item) for key, item in value.items()}
        case list():
            return [nearly(item) for item in value]
        case float():
            return pytest.approx(value, abs=1e-3)
        case _:
            return value
