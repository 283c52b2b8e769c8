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


@pytest.mark.parametrize("stream", [False, True])
async def test_equal_calls_at_once_are_one_at_the_worker(stack: Stack, stream: bool) -> None:
    worker, gate = await gated(stack)
    proxy = await stack.proxy(worker)
    calls = [asyncio.create_task(proxy.chat(temperature=0, stream=stream)) for i in range(10)]
    await until(lambda: proxy.services.in_flight == 10)
    gate.open.set()
    answers = await asyncio.gather(*calls)
    assert len(worker.seen) == 1
    assert [text(a) for a in answers] == ["ok"] * 10
    assert sorted(a.headers["x-helium-cache"] for a in answers) == ["coalesced"] * 9 + ["miss"]
    assert len({a.headers["x-request-id"] for a in answers}) == 10


@pytest.mark.parametrize("stream", [False, True])
async def test_a_leader_that_leaves_costs_its_followers_nothing(stack: Stack, stream: bool) -> None:
    worker, gate = await gated(stack)
    proxy = await stack.proxy(worker)
    async with http_client(proxy.url) as client:
        leader = asyncio.create_task(client.post(CHAT, json=chat(temperature=0, stream=stream)))
        await until(lambda: worker.inside == 1)
        followers = [asyncio.create_task(proxy.chat(temperature=0, stream=stream)) for _ in range(3)]
        await until(lambda: proxy.services.in_flight == 4)
        leader.cancel()
        await until(lambda: proxy.services.in_flight == 3)
    gate.open.set()
    answers = await asyncio.gather(*followers)
    assert [text(a) for a in answers] == ["ok"] * 3
    assert len(worker.seen) == 1
    again = await proxy.chat(temperature=0, stream=stream)
    assert again.headers["x-helium-cache"] == "hit", "stored though its leader left"


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


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hit_has_the_form_that_was_asked_for(stack: Stack, stream: bool) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    assert text(await proxy.chat(temperature=0, stream=stream)) == "ok"
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    again = await proxy.chat(temperature=0, stream=stream, **usage)
    assert again.headers["x-helium-cache"] == "hit"
    assert text(again) == "ok"
    assert again.headers["content-type"].startswith("text/event-stream" if stream else "application/json")
    if stream:
        found = events(again.content)
        assert found[-1] == (None, "[DONE]")
        assert found[-2][1]["usage"]["completion_tokens"] == 2, "the original call's"
    else:
        assert again.json()["usage"]["prompt_tokens"] == 10
    assert len(worker.seen) == 1


async def test_a_stream_and_a_whole_answer_are_two(stack: Stack) -> None:
    """Engines find tool calls in a stream otherwise than in a whole answer."""
    worker, gate = await gated(stack)
    proxy = await stack.proxy(worker)
    calls = [asyncio.create_task(proxy.chat(temperature=0, stream=stream)) for stream in (False, True)]
    await until(lambda: worker.inside == 2)
    gate.open.set()
    assert [a.headers["x-helium-cache"] for a in await asyncio.gather(*calls)] == ["miss", "miss"]


async def test_what_is_not_deterministic_is_computed_each_time(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    for fields in ({}, {"temperature": 0.7}, {"temperature": 0, "n": 2}, {"temperature": 0, "stream": "yes"}):
        for _ in range(2):
            assert (await proxy.chat(**fields)).headers["x-helium-cache"] == "bypass"
    assert len(worker.seen) == 8


@pytest.mark.parametrize("status", [400, 500])
async def test_those_who_joined_a_call_that_failed_have_failed(stack: Stack, status: int) -> None:
    opened = asyncio.Event()

    async def refuse(seen: Seen) -> None:
        await opened.wait()
        await seen.json({"error": {"message": "no"}}, status)

    worker = await stack.fake(always=refuse)
    proxy = await stack.proxy(worker)
    run = {"run": "r", "workflow": "w", "node": "n"}
    calls = [asyncio.create_task(proxy.chat(temperature=0, helium=run)) for _ in range(3)]
    coalescer = proxy.services.coalescer
    assert coalescer is not None
    await until(lambda: coalescer.statistics().seats == 3)
    opened.set()
    assert [a.status_code for a in await asyncio.gather(*calls)] == [status] * 3
    tries = 3 if status == 400 else 2  # what is refused may be the leader's alone; other failures are tried once more
    assert len(worker.seen) == tries
    nodes = (await proxy.client.get("/helium/runs/r")).json()["nodes"]
    assert [(node["state"], node["fate"], node["status"]) for node in nodes] == [("error", "error", status)] * 3


async def test_a_refusal_of_what_only_its_leader_said_is_its_leader_s_alone(stack: Stack) -> None:
    opened = asyncio.Event()

    async def strict(seen: Seen) -> None:
        await opened.wait()
        if isinstance(seen.body.get("user"), int):
            await seen.json({"error": {"message": "user must be a string"}}, 400)
        else:
            await answer(seen)

    worker = await stack.fake(always=strict)
    proxy = await stack.proxy(worker)
    leader = asyncio.create_task(proxy.chat(temperature=0, user=5))
    await until(lambda: worker.inside == 1)
    follower = asyncio.create_task(proxy.chat(temperature=0))
    await until(lambda: proxy.services.in_flight == 2)
    opened.set()
    assert [(await leader).status_code, (await follower).status_code] == [400, 200]


async def test_those_who_joined_get_what_is_no_json_as_it_is(stack: Stack) -> None:
    opened = asyncio.Event()

    async def packed(seen: Seen) -> None:
        await opened.wait()
        await seen.start(200, "application/octet-stream")
        await seen.write(b"\x00\x01\xff", more=False)

    worker = await stack.fake(always=packed)
    proxy = await stack.proxy(worker)
    body = {"model": "demo", "input": "x", "encoding_format": "bytes"}
    calls = [asyncio.create_task(proxy.client.post("/v1/embeddings", json=body)) for _ in range(3)]
    await until(lambda: proxy.services.in_flight == 3)
    opened.set()
    assert [(a.status_code, a.content) for a in await asyncio.gather(*calls)] == [(200, b"\x00\x01\xff")] * 3
    assert len(worker.seen) == 1


async def test_other_weights_under_a_model_s_name_answer_anew(stack: Stack) -> None:
    def card(root: str) -> Any:
        return lambda model: {"id": model, "root": root, "owned_by": "fake"}

    worker = await stack.fake()
    worker.card = card("/models/v1")  # type: ignore[method-assign]
    proxy = await stack.proxy(worker, pool={"models_interval_s": 0.01, "health_interval_s": 0.01})
    await proxy.chat(temperature=0)
    assert (await proxy.chat(temperature=0)).headers["x-helium-cache"] == "hit"
    worker.card = card("/models/v2")  # type: ignore[method-assign]
    await until(lambda: "/models/v2" in proxy.services.pool.weights("demo"))
    assert (await proxy.chat(temperature=0)).headers["x-helium-cache"] == "miss"


async def test_a_response_that_may_be_referred_to_is_a_hit_only_while_its_worker_has_it(stack: Stack) -> None:
    async def respond(seen: Seen) -> None:
        message = {"type": "message", "content": [{"type": "output_text", "text": "ok"}]}
        usage = {"input_tokens": 3, "output_tokens": 1, "total_tokens": 4}
        id_ = seen.body["request_id"]
        await seen.json({"id": id_, "object": "response", "status": "completed", "output": [message], "usage": usage})

    worker = await stack.fake(always=respond)
    proxy = await stack.proxy(worker)

    async def ask(**fields: Any) -> str:
        body = {"model": "demo", "input": "x", "temperature": 0, **fields}
        return str((await proxy.client.post("/v1/responses", json=body)).headers["x-helium-cache"])

    assert await ask(store=False) == "miss"
    assert await ask() == "miss", "which is to be stored"
    assert await ask() == "hit"
    proxy.services.owners.clear()
    assert await ask() == "miss"
    assert await ask(store=False) == "hit"


@pytest.mark.parametrize("origin", [None, "https://page.example"])
async def test_answers_with_headers_for_one_page_are_not_shared(stack: Stack, origin: str | None) -> None:
    proxy = await stack.proxy(await stack.fake())
    headers = {"origin": origin} if origin else None
    for result in ("miss", "hit") if origin is None else ("bypass", "bypass"):
        assert (await proxy.chat(temperature=0, headers=headers)).headers["x-helium-cache"] == result


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
    for result in ("miss", "hit"):
        again = await proxy.client.post("/v1/completions", json={**body, **usage})
        assert again.headers["x-helium-cache"] == result
        assert events(again.content)[-2][1]["usage"] == whole.json()["usage"]


async def test_words_that_look_like_no_number_are_words(stack: Stack) -> None:
    """Programs are full of them."""
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    text = "if (isNaN(x) || x === Infinity) return;"
    assert (await proxy.chat(text, temperature=0)).headers["x-helium-cache"] == "miss"
    assert (await proxy.chat(text, temperature=0)).headers["x-helium-cache"] == "hit"
