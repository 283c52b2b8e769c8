"""Streams: nothing held back, disconnects reach the engine, an end that comes too early is told in the API's form."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import httpx
import orjson
import pytest
from serving import CHAT, SLOW, USAGE, Seen, Stack, chat, events, http_client, until
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from helium_proxy.gateway.protocol import _Chunks

QUIET = {"prewarm": False, "lookahead": False, "pins": False}
"""The proxy asks engines for nothing of its own accord."""


def deltas(raw: bytes) -> list[str]:
    return [
        data["choices"][0]["delta"].get("content", "")
        for _, data in events(raw)
        if isinstance(data, dict) and data.get("choices")
    ]


@pytest.mark.parametrize("reuse", [True, False], ids=["shared", "alone"])
async def test_every_chunk_is_passed_on_before_the_next_one_comes(stack: Stack, reuse: bool) -> None:
    """The worker sends a chunk only once the client has read the one before: one held back would hang."""
    read = asyncio.Semaphore(0)

    async def one_by_one(seen: Seen) -> None:
        await seen.open_stream()
        for word in ("a", "b", "c"):
            await seen.delta(word)
            await read.acquire()
        await seen.done()

    worker = await stack.fake(always=one_by_one)
    proxy = await stack.proxy(worker)
    chunks = []
    async with asyncio.timeout(5), proxy.stream(temperature=0 if reuse else 1) as response:
        async for chunk in response.aiter_raw():
            chunks.append(chunk)
            read.release()
    assert [deltas(c) for c in chunks[:3]] == [["a"], ["b"], ["c"]]


async def test_an_event_cut_in_two_is_whole_at_the_client(stack: Stack) -> None:
    async def crumbs(seen: Seen) -> None:
        await seen.open_stream()
        for byte in orjson.dumps({"choices": [{"index": 0, "delta": {"content": "é🙂"}}]}).join((b"data: ", b"\n\n")):
            await seen.write(bytes([byte]))
        await seen.done()

    proxy = await stack.proxy(await stack.fake(always=crumbs))
    for fields in ({}, {"temperature": 0}, {"stream_options": {"include_usage": True}}):
        async with proxy.stream(**fields) as response:
            assert deltas(await response.aread()) == ["é🙂"]


async def test_a_client_that_leaves_a_stream_ends_it_at_the_engine(stack: Stack) -> None:
    engine = await stack.engine(profile=SLOW)
    proxy = await stack.proxy(engine, directives=QUIET)
    for temperature in (0, 1):
        async with proxy.stream(
            f"t{temperature}", max_tokens=1000, ignore_eos=True, temperature=temperature
        ) as response:
            await anext(response.aiter_raw())
            assert await engine.running(proxy.client) >= 1
        await until(lambda: _idle(engine.running(proxy.client)), within=1.0)
    await until(lambda: proxy.services.in_flight == 0)
    assert proxy.services.dispatcher.statistics().running == 0


async def _idle(running: Any) -> bool:
    return await running == 0


@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_client_that_leaves_before_the_answer_ends_it_at_the_engine(stack: Stack, temperature: int) -> None:
    engine = await stack.engine(profile=SLOW)
    proxy = await stack.proxy(engine, directives=QUIET)
    async with http_client(proxy.url) as client:
        call = asyncio.create_task(
            client.post(CHAT, json=chat(max_tokens=1000, ignore_eos=True, temperature=temperature))
        )
        (worker,) = proxy.services.pool.all()
        await until(lambda: worker.inflight == 1)
        await until(lambda: _some(engine.running(proxy.client)))
        call.cancel()
    await until(lambda: _idle(engine.running(proxy.client)), within=1.0)
    await until(lambda: proxy.services.in_flight == 0)
    assert worker.inflight == 0
    assert proxy.services.dispatcher.statistics().running == 0


async def _some(running: Any) -> bool:
    return await running > 0


async def test_a_client_that_leaves_the_queue_is_taken_out_of_it(stack: Stack) -> None:
    release = asyncio.Event()

    async def wait(seen: Seen) -> None:
        await release.wait()
        await seen.json(seen.completion())

    worker = await stack.fake(always=wait)
    proxy = await stack.proxy(worker, dispatch={"default_running": 1})
    first = asyncio.create_task(proxy.chat("first"))
    await until(lambda: worker.inside == 1)
    async with http_client(proxy.url) as client:
        second = asyncio.create_task(client.post(CHAT, json=chat("second")))
        await until(lambda: proxy.services.dispatcher.statistics().queued == 1)
        second.cancel()
    await until(lambda: proxy.services.dispatcher.statistics().queued == 0)
    release.set()
    assert (await first).status_code == 200
    assert len(worker.seen) == 1


async def test_a_client_that_leaves_other_routes_is_noticed_too(stack: Stack) -> None:
    left = asyncio.Event()

    async def hang(seen: Seen) -> None:
        await seen.gone()
        left.set()

    worker = await stack.fake(always=hang)
    proxy = await stack.proxy(worker)
    async with http_client(proxy.url) as client:
        call = asyncio.create_task(client.post("/v1/audio/other", json={"model": "demo"}))
        await until(lambda: worker.inside == 1)
        call.cancel()
    async with asyncio.timeout(1):
        await left.wait()


async def break_off(seen: Seen) -> None:
    await seen.open_stream()
    await seen.delta("begun")
    seen.die()
    await seen.gone()


@pytest.mark.parametrize("temperature", [0, 1], ids=["shared", "alone"])
async def test_a_stream_that_breaks_ends_with_an_error_event(stack: Stack, temperature: int) -> None:
    worker, other = await stack.fake(always=break_off), await stack.fake(always=break_off)
    proxy = await stack.proxy(worker, other)
    async with proxy.stream(temperature=temperature) as response:
        assert response.status_code == 200
        found = events(await response.aread())
    assert [d["choices"][0]["delta"]["content"] for _, d in found[:1]] == ["begun"]
    assert found[-2][1]["error"]["code"] == "upstream_error"
    assert set(found[-2][1]["error"]) == {"message", "type", "param", "code"}
    assert found[-1] == (None, "[DONE]")
    assert len(worker.seen) + len(other.seen) == 1, "a call whose answer has begun is not sent again"


async def test_a_broken_stream_of_messages_and_of_responses_ends_in_its_own_form(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake(always=break_off))
    message = {"model": "demo", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "stream": True}
    response = await proxy.client.post("/v1/messages", json=message)
    name, data = events(response.content)[-1]
    assert name == "error"
    assert data["type"] == "error"
    assert data["error"]["type"] == "api_error"
    response = await proxy.client.post("/v1/responses", json={"model": "demo", "input": "x", "stream": True})
    name, data = events(response.content)[-1]
    assert name == "error"
    assert data["code"] == "upstream_error"


async def test_a_broken_answer_of_another_route_is_not_taken_for_a_whole_one(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake(always=break_off))
    response = await proxy.client.post("/v1/unknown", json={"model": "demo"})
    name, data = events(response.content)[-2]
    assert data["error"]["code"] == "upstream_error", (name, data)


async def test_other_routes_streams_are_passed_on_as_they_come(stack: Stack) -> None:
    """Speech, say, or lines of JSON; one that breaks is not sent again, nor taken for a whole one."""
    more = asyncio.Event()

    async def speak(seen: Seen) -> None:
        await seen.start(200, "audio/pcm")
        await seen.write(b"one")
        async with asyncio.timeout(10):
            await more.wait()
        if seen.body.get("breaks"):
            seen.die()
            await seen.gone()
        else:
            await seen.write(b"two", more=False)

    workers = [await stack.fake(always=speak), await stack.fake(always=speak)]
    proxy = await stack.proxy(*workers)

    async def listen(**fields: Any) -> bytes:
        body = {"model": "demo", **fields}
        heard = b""
        async with proxy.client.stream("POST", "/v1/audio/speech", json=body) as response:
            assert response.headers["content-type"] == "audio/pcm"
            async for chunk in response.aiter_raw():
                heard += chunk
                more.set()
        return heard

    assert await listen() == b"onetwo"
    more.clear()
    with pytest.raises(httpx.RemoteProtocolError):
        await listen(breaks=True)
    assert sum(len(w.seen) for w in workers) == 2


async def test_the_engine_s_own_error_event_is_passed_on(stack: Stack) -> None:
    engine = await stack.engine(profile=SLOW)
    proxy = await stack.proxy(engine)
    await proxy.client.post(f"{engine.url}/engine/faults", json={"kind": "stream_error", "after_tokens": 2})
    async with proxy.stream(max_tokens=10, temperature=0) as response:
        found = events(await response.aread())
    assert found[-2][1]["error"]["code"] == 500
    assert found[-1] == (None, "[DONE]")
    async with proxy.stream(max_tokens=10, temperature=0) as response:
        assert response.headers["x-helium-cache"] == "miss", "an error is never cached"
        assert len(deltas(await response.aread())) > 10 - 1


async def test_usage_is_asked_for_in_the_client_s_stead_and_left_out_again(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    async with proxy.stream() as response:
        found = events(await response.aread())
    assert worker.seen[-1].body["stream_options"] == {"include_usage": True}
    assert not any(isinstance(d, dict) and d.get("usage") for _, d in found)
    async with proxy.stream(stream_options={"include_usage": True}) as response:
        found = events(await response.aread())
    assert found[-2][1]["usage"]["prompt_tokens"] == 10
    run = proxy.services.workflows.runs(1, None, None)[0]
    calls = proxy.services.workflows.run(run["run"])
    assert calls is not None
    assert calls["nodes"][0]["prompt_tokens"] == 10
    assert calls["nodes"][0]["output_tokens"] == 2


async def test_the_fingerprint_is_where_it_would_be_without_us(stack: Stack) -> None:
    """vLLM puts it into the usage chunk, and into the finishing one where no usage was asked for."""

    async def vllm(seen: Seen) -> None:
        usage = (seen.body.get("stream_options") or {}).get("include_usage")
        await seen.open_stream()
        await seen.delta("ok")
        mark = {"system_fingerprint": "fp-1"}
        final = {"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}
        await seen.event({**seen.envelope("chat.completion.chunk"), "choices": [final], **({} if usage else mark)})
        if usage:
            await seen.event({**seen.envelope("chat.completion.chunk"), "choices": [], "usage": USAGE, **mark})
        await seen.done()

    worker = await stack.fake(always=vllm)
    proxy = await stack.proxy(worker, reuse={"enabled": False})
    for temperature in (0, 1):
        async with proxy.stream(temperature=temperature) as response:
            found = events(await response.aread())
        assert worker.seen[-1].body["stream_options"] == {"include_usage": True}
        assert [d.get("system_fingerprint") for _, d in found[:-1]] == [None, "fp-1"]
        async with proxy.stream(n=2, temperature=temperature) as response:
            await response.aread()
        assert "stream_options" not in worker.seen[-1].body, "of several choices each would have to wait for the end"


async def test_a_slow_reader_holds_the_worker_back(stack: Stack) -> None:
    """Back-pressure: an answer far larger than all buffers is not taken in while nobody reads it."""
    sent = 0

    async def flood(seen: Seen) -> None:
        nonlocal sent
        await seen.open_stream()
        for _ in range(300):
            await seen.delta("x" * 100_000)
            sent += 1
        await seen.done()

    proxy = await stack.proxy(await stack.fake(always=flood))
    async with proxy.stream() as response:
        chunks = response.aiter_raw()
        await anext(chunks)
        before = -1
        while before != sent:  # until it has come to rest
            before = sent
            await asyncio.sleep(0.05)
        assert sent < 250
        rest = [c async for c in chunks]
    assert sent == 300
    assert sum(map(len, rest)) > 100_000 * 290


def test_a_chunk_pushed_past_uvicorn_is_framed_and_an_empty_one_does_not_end_the_body() -> None:
    cycle = Mock(spec=RequestResponseCycle, chunked_encoding=True, disconnected=False, response_complete=False)
    cycle.flow, cycle.transport = Mock(write_paused=False), Mock()
    client = _Chunks(cycle)
    assert client.ready()
    client.write(b"")
    client.write(b"data: 1\n\n")
    assert [call.args for call in cycle.transport.write.call_args_list] == [(b"9\r\ndata: 1\n\n\r\n",)]
    for name in ("disconnected", "response_complete"):
        setattr(cycle, name, True)
        assert not client.ready()
        setattr(cycle, name, False)
    cycle.flow.write_paused = True
    assert not client.ready(), "a client that reads slowly is waited for"


async def test_half_a_stream_is_never_taken_for_a_whole_one(stack: Stack) -> None:
    async def half(seen: Seen) -> None:
        await seen.open_stream()
        await seen.delta("half")
        seen.die()
        await seen.gone()

    proxy = await stack.proxy(await stack.fake(always=half))
    answer = await proxy.client.post(CHAT, json=chat(stream=1))
    told = events(answer.content)
    assert "error" in told[-2][1], "whatever the client's word for a stream was"
    assert told[-1] == (None, "[DONE]")
