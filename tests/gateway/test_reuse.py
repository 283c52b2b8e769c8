"""Equal calls through the gateway: joined while in flight, answered from the cache afterwards, as clients allow."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serving import CHAT, FakeWorker, Seen, Stack, answer, chat, events, http_client, until


class Gate:
    """A worker's behaviour that waits until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, seen: Seen) -> None:
        await self.open.wait()
        await answer(seen)


async def gated(stack: Stack) -> tuple[FakeWorker, Gate]:
    gate = Gate()
    return await stack.fake(always=gate), gate


def text(response: Any) -> str:
    if response.headers["content-type"].startswith("text/event-stream"):
        data = [d for _, d in events(response.content) if isinstance(d, dict) and d.get("choices")]
        return "".join(d["choices"][0]["delta"].get("content") or "" for d in data)
    return str(response.json()["choices"][0]["message"]["content"])


async def test_equal_calls_at_once_are_one_at_the_worker(stack: Stack) -> None:
    worker, gate = await gated(stack)
    proxy = await stack.proxy(worker)
    calls = [asyncio.create_task(proxy.chat(temperature=0, stream=i % 2 == 0)) for i in range(10)]
    await until(lambda: proxy.services.in_flight == 10)
    gate.open.set()
    answers = await asyncio.gather(*calls)
    assert len(worker.seen) == 1
    assert [text(a) for a in answers] == ["ok"] * 10
    assert sorted(a.headers["x-helium-cache"] for a in answers) == ["coalesced"] * 9 + ["miss"]
    assert len({a.headers["x-request-id"] for a in answers}) == 10


async def test_a_leader_that_leaves_costs_its_followers_nothing(stack: Stack) -> None:
    worker, gate = await gated(stack)
    proxy = await stack.proxy(worker)
    async with http_client(proxy.url) as client:
        leader = asyncio.create_task(client.post(CHAT, json=chat(temperature=0)))
        await until(lambda: worker.inside == 1)
        followers = [asyncio.create_task(proxy.chat(temperature=0, stream=s)) for s in (True, False, True)]
        await until(lambda: proxy.services.in_flight == 4)
        leader.cancel()
        await until(lambda: proxy.services.in_flight == 3)
    gate.open.set()
    answers = await asyncio.gather(*followers)
    assert [text(a) for a in answers] == ["ok"] * 3
    assert len(worker.seen) == 1
    assert (await proxy.chat(temperature=0)).headers["x-helium-cache"] == "hit", "stored though its leader left"


async def test_when_all_have_left_the_call_is_aborted(stack: Stack) -> None:
    left = asyncio.Event()

    async def hang(seen: Seen) -> None:
        await seen.gone()
        left.set()

    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker)
    async with http_client(proxy.url) as client:
        calls = [asyncio.create_task(client.post(CHAT, json=chat(temperature=0))) for _ in range(3)]
        await until(lambda: proxy.services.in_flight == 3 and worker.inside == 1)
        for call in calls:
            call.cancel()
    async with asyncio.timeout(2):
        await left.wait()
    await until(lambda: proxy.services.dispatcher.statistics().running == 0)


async def test_an_error_is_neither_stored_nor_shared_with_more_than_it_must(stack: Stack) -> None:
    async def fail(seen: Seen) -> None:
        await seen.json({"error": {"message": "no", "type": "x", "param": None, "code": 500}}, 500)

    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    worker.then = [fail]
    assert (await proxy.chat(temperature=0)).status_code == 500
    good = await proxy.chat(temperature=0)
    assert good.status_code == 200
    assert good.headers["x-helium-cache"] == "miss"


async def cache_of(proxy: Any, control: str | None = None, **fields: Any) -> str:
    headers = {"Cache-Control": control} if control else None
    response = await proxy.chat(headers=headers, temperature=0, **fields)
    return f"{response.status_code} {response.headers.get('x-helium-cache')}"


async def test_cache_control(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    assert await cache_of(proxy, "only-if-cached") == "504 None"
    assert await cache_of(proxy, "no-store") == "200 bypass"
    assert await cache_of(proxy, "only-if-cached") == "504 None", "no-store stored nothing"
    assert await cache_of(proxy) == "200 miss"
    assert await cache_of(proxy, "only-if-cached") == "200 hit"
    assert await cache_of(proxy) == "200 hit"
    assert await cache_of(proxy, "max-age=60") == "200 hit"
    seen = len(worker.seen)
    for control in ("no-cache", "no-store", "max-age=0"):
        assert (await cache_of(proxy, control)).startswith("200")
        seen += 1
        assert len(worker.seen) == seen, control
    assert (await proxy.client.delete("/helium/cache")).json() == {"purged": 1}
    assert await cache_of(proxy, "only-if-cached") == "504 None"


async def test_the_cache_s_error_is_in_the_api_s_form(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake())
    response = await proxy.chat(headers={"Cache-Control": "only-if-cached"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "cache_miss"


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("then", [False, True])
async def test_stored_as_one_form_and_told_as_the_other(stack: Stack, first: bool, then: bool) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    assert text(await proxy.chat(temperature=0, stream=first)) == "ok"
    again = await proxy.chat(temperature=0, stream=then, stream_options={"include_usage": True} if then else None)
    assert again.headers["x-helium-cache"] == "hit"
    assert text(again) == "ok"
    assert again.headers["content-type"].startswith("text/event-stream" if then else "application/json")
    if then:
        found = events(again.content)
        assert found[-1] == (None, "[DONE]")
        assert found[-2][1]["usage"]["completion_tokens"] == 2, "the original call's"
    else:
        assert again.json()["usage"]["prompt_tokens"] == 10
    assert len(worker.seen) == 1


async def test_what_is_not_deterministic_is_computed_each_time(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    for fields in ({}, {"temperature": 0.7}, {"temperature": 0, "n": 2}, {"temperature": 0, "stream": "yes"}):
        for _ in range(2):
            assert (await proxy.chat(**fields)).headers["x-helium-cache"] == "bypass"
    assert len(worker.seen) == 8


async def test_those_who_joined_a_call_that_failed_have_failed(stack: Stack) -> None:
    opened = asyncio.Event()

    async def refuse(seen: Seen) -> None:
        await opened.wait()
        await seen.json({"error": {"message": "no"}}, 400)

    worker = await stack.fake(always=refuse)
    proxy = await stack.proxy(worker)
    run = {"run": "r", "workflow": "w", "node": "n"}
    calls = [asyncio.create_task(proxy.chat(temperature=0, helium=run)) for _ in range(3)]
    await until(lambda: proxy.services.in_flight == 3)
    opened.set()
    assert [a.status_code for a in await asyncio.gather(*calls)] == [400] * 3
    assert len(worker.seen) == 1
    nodes = (await proxy.client.get("/helium/runs/r")).json()["nodes"]
    assert [(node["state"], node["fate"], node["status"]) for node in nodes] == [("error", "error", 400)] * 3


async def test_an_answer_without_usage_is_not_kept_for_those_who_want_it(stack: Stack) -> None:
    """Streams of several prompts cannot be asked for their usage in the client's stead."""
    engine = await stack.engine()
    proxy = await stack.proxy(engine)
    body = {"model": "demo", "prompt": ["one", "two"], "temperature": 0, "max_tokens": 3}
    streamed = await proxy.client.post("/v1/completions", json={**body, "stream": True})
    assert streamed.headers["x-helium-cache"] == "bypass"
    whole = await proxy.client.post("/v1/completions", json=body)
    assert whole.headers["x-helium-cache"] == "miss"
    assert whole.json()["usage"]["prompt_tokens"] > 0
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    again = await proxy.client.post("/v1/completions", json={**body, **usage})
    assert again.headers["x-helium-cache"] == "hit"
    assert events(again.content)[-2][1]["usage"] == whole.json()["usage"]
