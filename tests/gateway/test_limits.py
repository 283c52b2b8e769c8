"""Bounds: bodies, headers, the queue, deadlines. What is too much gets a clear 4xx or 504 and costs nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from serving import CHAT, Proxy, Seen, Stack, chat, until

from helium_proxy import metrics
from helium_proxy.dispatch.state import Assignment, QueuedCall
from helium_proxy.errors import QueueFull


async def hang(seen: Seen) -> None:
    await seen.gone()


async def error_of(proxy: Proxy, path: str = CHAT, **request: object) -> tuple[int, str]:
    response = await proxy.client.post(path, **request)  # type: ignore[arg-type]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


@pytest.mark.parametrize("path", [CHAT, "/v1/any/other", "/tokenize"])
async def test_a_body_that_is_too_large_is_refused(stack: Stack, path: str) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, server={"max_body_bytes": 2000})
    assert (await proxy.chat("x" * 1000)).status_code == 200
    assert await error_of(proxy, path, json=chat("x" * 3000)) == (413, "request_too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 100

    assert await error_of(proxy, path, content=pieces()) == (413, "request_too_large")
    assert len(worker.seen) == 1


async def test_headers_that_are_too_large_are_refused(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker, server={"max_header_bytes": 4096})
    assert (await proxy.chat(headers={"X-Large": "x" * 3000})).status_code == 200
    large = {"X-Large": "x" * 5000}
    assert await error_of(proxy, json=chat(), headers=large) == (431, "headers_too_large")
    assert (await proxy.client.get("/v1/models", headers=large)).status_code == 431
    assert (await proxy.client.get("/v1/models/" + "x" * 5000)).status_code == 431
    assert len(worker.seen) == 1


async def test_a_head_that_never_ends_is_cut(stack: Stack) -> None:
    proxy = await stack.proxy(server={"max_header_bytes": 4096}, engine={"count": 0})
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.server.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Endless: " + b"x" * 5000)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b"headers_too_large" in answer
    writer.close()


async def test_a_full_queue_says_when_to_come_back(stack: Stack) -> None:
    worker = await stack.fake(always=hang)
    limits = {"max_running": 1, "default_running": 1, "max_queue": 2}
    proxy = await stack.proxy(worker, dispatch=limits)
    calls = [asyncio.create_task(proxy.chat("0"))]
    await until(lambda: worker.inside == 1)
    for i in (1, 2):
        calls.append(asyncio.create_task(proxy.chat(str(i))))
        await until(lambda n=i: proxy.services.dispatcher.statistics().queued == n)
    response = await proxy.chat("3")
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: proxy.services.in_flight == 0)
    assert proxy.services.dispatcher.statistics().queued == 0


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_deadline_ends_the_call_here_and_at_the_worker(stack: Stack, temperature: int) -> None:
    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker)
    response = await proxy.chat(temperature=temperature, helium={"deadline_ms": 60})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    await until(lambda: worker.inside == 0, within=1)
    response = await proxy.chat(headers={"X-Helium-Deadline-Ms": "60"})
    assert response.status_code == 504
    await until(lambda: worker.inside == 0, within=1)
    assert proxy.services.dispatcher.statistics().running == 0


async def test_the_server_s_own_limit_holds_for_all(stack: Stack) -> None:
    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker, server={"request_timeout_s": 0.06})
    assert (await proxy.chat()).status_code == 504
    assert (await proxy.chat(helium={"deadline_ms": 60_000})).status_code == 504


async def test_a_deadline_in_the_queue(stack: Stack) -> None:
    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker, dispatch={"default_running": 1})
    first = asyncio.create_task(proxy.chat("first"))
    await until(lambda: worker.inside == 1)
    assert (await proxy.chat("second", helium={"deadline_ms": 60})).status_code == 504
    assert proxy.services.dispatcher.statistics().queued == 0
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert len(worker.seen) == 1


async def test_a_deadline_in_the_middle_of_a_stream(stack: Stack) -> None:
    async def begin(seen: Seen) -> None:
        await seen.open_stream()
        await seen.delta("begun")
        await seen.gone()

    worker = await stack.fake(always=begin)
    proxy = await stack.proxy(worker)
    async with proxy.stream(helium={"deadline_ms": 200}) as response:
        raw = await response.aread()
    assert b"begun" in raw
    assert b"deadline_exceeded" in raw
    assert raw.endswith(b"data: [DONE]\n\n")
    await until(lambda: worker.inside == 0, within=1)


async def test_a_silent_worker_is_given_up(stack: Stack) -> None:
    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker, pool={"read_timeout_s": 0.05, "max_attempts": 1})
    response = await proxy.chat()
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_error"


async def test_a_stream_that_falls_silent_after_its_head_was_too_slow_and_not_lost(stack: Stack) -> None:
    async def head_only(seen: Seen) -> None:
        await seen.open_stream()
        await seen.write(b"")
        await hang(seen)

    def retries(reason: str) -> float:
        return metrics.REGISTRY.get_sample_value("helium_retries_total", {"reason": reason}) or 0.0

    proxy = await stack.proxy(
        await stack.fake(always=head_only), await stack.fake(always=head_only), pool={"read_timeout_s": 0.05}
    )
    slow, lost = retries("timeout"), retries("lost")
    async with proxy.stream() as response:
        assert response.status_code == 502
    assert retries("timeout") > slow
    assert retries("lost") == lost


async def test_a_submitted_plan_adds_nothing_to_a_full_queue(stack: Stack) -> None:
    """Its calls are refused before anything is noted of them: they are tried again, maybe many times."""
    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker, dispatch={"max_queue": 1, "default_running": 1}, reuse={"coalesce": False})
    live = [asyncio.create_task(proxy.chat("0"))]
    await until(lambda: worker.inside == 1)
    live.append(asyncio.create_task(proxy.chat("1")))
    await until(lambda: proxy.services.dispatcher.statistics().queued == 1)
    node = {"id": "a", "messages": [{"role": "user", "content": "{{inputs.q}}"}]}
    plan = {"workflow": "w", "model": "demo", "nodes": [node], "inputs": [{"q": "1"}, {"q": "2"}]}
    refused, check = [], proxy.services.dispatcher.check_room

    def note() -> None:
        try:
            check()
        except QueueFull:
            refused.append(1)
            raise

    proxy.services.dispatcher.check_room = note  # type: ignore[method-assign]
    job = (await proxy.client.post("/v1/workflows", json=plan)).json()
    await until(lambda: len(refused) > 3)
    assert proxy.services.workflows.statistics().calls == 2
    await proxy.client.delete(f"/v1/workflows/{job['id']}")
    for task in live:
        task.cancel()
    await asyncio.gather(*live, return_exceptions=True)


async def test_untagged_calls_of_one_tenant_share_a_turn(stack: Stack) -> None:
    """What they belong to is a guess: the parts of one program look like workflows of their own."""
    proxy = await stack.proxy(await stack.fake())
    seen = []
    acquire = proxy.services.dispatcher.acquire

    async def note(call: QueuedCall) -> Assignment:
        seen.append(call.turns)
        return await acquire(call)

    proxy.services.dispatcher.acquire = note  # type: ignore[method-assign]
    for fields in ({}, {"helium": {"workflow": "named"}}, {"helium": {"run": "r"}}):
        assert (await proxy.chat("hello", **fields)).status_code == 200
    assert seen == [("default", "~"), ("default", "default/named"), ("default", "~")]


async def test_calls_that_name_no_model_of_several_are_bounded_too(stack: Stack) -> None:
    workers = [await stack.fake("one", always=hang), await stack.fake("two", always=hang)]
    proxy = await stack.proxy(
        *workers, server={"request_timeout_s": 0.5}, dispatch={"max_queue": 1, "default_running": 1}
    )
    body = {"messages": [{"role": "user", "content": "x"}]}
    answers = await asyncio.gather(*(error_of(proxy, json=body) for _ in range(12)))
    assert set(answers) == {(429, "queue_full"), (504, "deadline_exceeded")}
    assert await error_of(proxy, json={**body, "model": "three"}) == (504, "deadline_exceeded")
    assert await error_of(proxy, "/v1/any/other", json=body) == (504, "deadline_exceeded")


async def test_the_queue_s_gauge_follows_a_model_whose_workers_are_gone(stack: Stack) -> None:
    def waiting() -> float | None:
        return metrics.REGISTRY.get_sample_value("helium_queue_calls", {"model": "demo"})

    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker, dispatch={"default_running": 1, "no_worker_wait_s": 2})
    calls = [asyncio.create_task(proxy.chat(str(i))) for i in range(4)]
    await until(lambda: waiting() == 3)
    await worker.server.kill()
    await asyncio.gather(*calls)
    await until(lambda: waiting() == 0)


async def test_models_that_nobody_has_take_no_label_from_those_that_are(stack: Stack) -> None:
    proxy = await stack.proxy(engine={"count": 0}, dispatch={"no_worker_wait_s": 0.01})
    calls = [proxy.client.post(CHAT, json=chat(str(i)) | {"model": f"made up {i}"}) for i in range(60)]
    assert {response.status_code for response in await asyncio.gather(*calls)} == {503}
    assert "made_up" not in metrics.render()[0].decode()


async def test_a_form_with_many_marks_is_read_in_one_pass(stack: Stack) -> None:
    async def any_body(seen: Seen) -> None:
        await seen.json({"text": "heard"})

    worker = await stack.fake(always=any_body)
    proxy = await stack.proxy(worker)
    body = b'name="model"\r\n' * 100_000  # minutes where each mark is searched from to the end
    response = await proxy.client.post(
        "/v1/audio/transcriptions", content=body, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert response.status_code == 200
    assert worker.seen[-1].raw == body
