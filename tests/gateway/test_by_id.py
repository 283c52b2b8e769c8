"""Requests by id and conversations go to the worker that has them."""

from __future__ import annotations

import asyncio

import pytest
from serving import SLOW, Stack, until

RESPONSES = "/v1/responses"


async def test_a_stored_response_is_fetched_where_it_was_made(stack: Stack) -> None:
    proxy = await stack.proxy(*[await stack.engine() for _ in range(3)])
    made = {}
    for i in range(9):
        response = await proxy.client.post(
            RESPONSES, json={"model": "demo", "input": f"hello {i}", "max_output_tokens": 4}
        )
        made[response.json()["id"]] = response
    assert len(made) == 9
    for name, response in made.items():
        fetched = await proxy.client.get(f"{RESPONSES}/{name}")
        assert fetched.status_code == 200
        assert fetched.json() == response.json()
        assert fetched.headers["x-helium-worker"] == response.headers["x-helium-worker"]


async def test_after_a_restart_of_the_proxy_all_are_asked(stack: Stack) -> None:
    engines = [await stack.engine() for _ in range(3)]
    before = await stack.proxy(*engines)
    names = []
    for i in range(6):
        body = {"model": "demo", "input": f"hello {i}", "max_output_tokens": 4}
        names.append((await before.client.post(RESPONSES, json=body)).json()["id"])
    after = await stack.proxy(*engines)
    for name in names:
        assert (await after.client.get(f"{RESPONSES}/{name}")).json()["id"] == name
    unknown = await after.client.get(f"{RESPONSES}/resp_unknown")
    assert unknown.status_code == 404
    assert "resp_unknown" in unknown.json()["error"]["message"], "the engine's own answer"


async def test_a_conversation_stays_with_its_worker(stack: Stack) -> None:
    proxy = await stack.proxy(*[await stack.engine() for _ in range(3)])
    previous = None
    workers = set()
    for i in range(6):
        body = {"model": "demo", "input": f"turn {i}", "max_output_tokens": 4, "previous_response_id": previous}
        response = await proxy.client.post(RESPONSES, json={k: v for k, v in body.items() if v is not None})
        assert response.status_code == 200, response.text
        previous = response.json()["id"]
        workers.add(response.headers["x-helium-worker"])
    assert len(workers) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repeated_deterministic_response_can_be_referred_to(stack: Stack, stream: bool) -> None:
    """Every response has an id of its own, also one that was answered from the cache, and each can be built upon."""
    proxy = await stack.proxy(*[await stack.engine() for _ in range(2)])
    body = {"model": "demo", "input": "the same", "max_output_tokens": 4, "temperature": 0}
    answers = [await proxy.client.post(RESPONSES, json=body) for _ in range(3)]
    names = [a.json()["id"] for a in answers]
    assert len(set(names)) == 3
    for name in names:
        assert (await proxy.client.get(f"{RESPONSES}/{name}")).json()["id"] == name
        following = {**body, "input": "go on", "previous_response_id": name, "stream": stream}
        assert (await proxy.client.post(RESPONSES, json=following)).status_code == 200


async def test_a_background_response_is_cancelled_where_it_runs(stack: Stack) -> None:
    engines = [await stack.engine(profile=SLOW) for _ in range(2)]
    proxy = await stack.proxy(*engines)
    body = {"model": "demo", "input": "long", "max_output_tokens": 3000, "background": True}
    made = [(await proxy.client.post(RESPONSES, json={**body, "input": f"long {i}"})).json()["id"] for i in range(4)]
    for name in made:
        cancelled = await proxy.client.post(f"{RESPONSES}/{name}/cancel")
        assert cancelled.status_code == 200
        assert cancelled.json()["status"] == "cancelled"

    async def idle() -> bool:
        return sum(await asyncio.gather(*(e.running(proxy.client) for e in engines))) == 0

    await until(idle)


async def test_owners_are_remembered_within_bounds(stack: Stack) -> None:
    proxy = await stack.proxy(engine={"count": 0})
    for i in range(100_050):
        proxy.services.note_owner(f"resp_{i}", "w")
    assert len(proxy.services.owners) == 100_000
    assert "resp_49" not in proxy.services.owners
    assert "resp_100049" in proxy.services.owners
