"""A room that breaks costs its own benefit and never an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from serving import Proxy, Stack, chat, http_client, until

from helium_proxy import metrics


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug")


async def broken_async(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a bug")


def failures(room: str) -> float:
    value: float = metrics.FAIL_OPEN.labels(room)._value.get()
    return value


ROOMS: dict[str, Callable[[pytest.MonkeyPatch, Proxy], None]] = {
    "workflow arrives": lambda m, p: m.setattr(p.services.workflows, "arrive", broken),
    "workflow starts": lambda m, p: m.setattr(p.services.workflows, "started", broken),
    "cache store": lambda m, p: m.setattr("helium_proxy.gateway.compute.make_entry", broken),
    "predictions": lambda m, p: m.setattr("helium_proxy.gateway.compute.compare", broken),
    "directives": lambda m, p: m.setattr(p.services.ahead, "sent", broken),
    "directives afterwards": lambda m, p: m.setattr(p.services.ahead, "done", broken),
    "workflow finishes": lambda m, p: m.setattr(p.services.workflows, "finished", broken),
    "policy": lambda m, p: m.setattr("helium_proxy.dispatch.dispatcher.decide", broken),
    "tokenizer": lambda m, p: m.setattr("helium_proxy.planner.estimate.token_chain", broken),
    "estimate": lambda m, p: m.setattr(type(p.services.estimator), "estimate", broken_async),
    "cache key": lambda m, p: m.setattr("helium_proxy.gateway.llm.cache_key", broken),
    "cache look-up": lambda m, p: m.setattr(type(p.services.cache), "peek", broken),
    "reply": lambda m, p: m.setattr("helium_proxy.gateway.replies.reply_of", broken),
}


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_answered_without_it(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, room: str, stream: bool
) -> None:
    proxy = await stack.proxy(await stack.engine(), await stack.engine())
    ROOMS[room](monkeypatch, proxy)
    for i in range(3):
        for temperature in (0, 1):
            response = await proxy.chat(f"text {i}", stream=stream, temperature=temperature, max_tokens=3)
            assert response.status_code == 200
            assert b"error" not in response.content
    monkeypatch.undo()
    statistics = proxy.services.dispatcher.statistics()
    assert (statistics.running, statistics.queued, proxy.services.in_flight) == (0, 0, 0)
    assert all(w.inflight == 0 for w in proxy.services.pool)


async def test_failures_are_counted(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await stack.proxy(await stack.fake())
    ROOMS["workflow arrives"](monkeypatch, proxy)
    ROOMS["policy"](monkeypatch, proxy)
    before = failures("workflow"), failures("dispatch")
    assert (await proxy.chat()).status_code == 200
    assert failures("workflow") == before[0] + 1
    assert failures("dispatch") > before[1]


async def test_what_nobody_foresaw_is_a_500_in_the_api_s_form(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await stack.proxy(await stack.fake())
    monkeypatch.setattr("helium_proxy.gateway.calls.Calls.serve", broken_async)
    response = await proxy.client.post("/v1/chat/completions", json=chat())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "bug" not in response.text


async def test_a_call_that_is_cancelled_while_its_answer_is_stored_gives_its_slot_back(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that waits (SQLite, Redis) and a client that does not."""
    proxy = await stack.proxy(await stack.fake())
    storing = asyncio.Event()

    async def slow(*_: Any) -> None:
        storing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(type(proxy.services.cache), "put", slow)
    async with http_client(proxy.url) as client:
        call = asyncio.create_task(client.post("/v1/chat/completions", json=chat(temperature=0)))
        await storing.wait()
        call.cancel()
    await until(lambda: proxy.services.in_flight == 0)
    await until(lambda: proxy.services.dispatcher.statistics().running == 0)
    assert all(w.inflight == 0 for w in proxy.services.pool)


async def test_a_purge_that_fails_says_so(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = await stack.proxy(await stack.fake())
    monkeypatch.setattr(type(proxy.services.cache), "purge", broken_async)
    response = await proxy.client.delete("/helium/cache")
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_error"


async def test_a_bug_in_an_operators_route_is_an_error_in_the_usual_form(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await stack.proxy(await stack.fake())
    monkeypatch.setattr(proxy.services.workflows, "runs", broken)
    counted = metrics.HTTP_REQUESTS.labels("operator", 500)._value.get()
    response = await proxy.client.get("/helium/runs")
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "internal error",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert metrics.HTTP_REQUESTS.labels("operator", 500)._value.get() == counted + 1
