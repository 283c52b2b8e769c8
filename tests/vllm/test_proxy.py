"""The proxy in front of two real vLLM engines: what only a real engine can show."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio
from engines import EngineClient, VllmEngine
from serving import CHAT, Proxy, Stack, chat, events, http_client, many_client, until

from helium_proxy.residency.tokens import LocalTokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def proxy(vllm_engines: list[EngineClient]) -> AsyncIterator[Proxy]:
    """Stored answers are off, and what the proxy asks of its own accord: every call is computed, and nothing else."""
    stack = Stack()
    quiet = {"prewarm": False, "lookahead": False, "pins": False}
    yield await stack.proxy(*(e.url for e in vllm_engines), reuse={"enabled": False}, directives=quiet)
    await stack.close()


async def running(engine: EngineClient) -> int:
    return await asyncio.to_thread(engine.running_count)


async def test_what_is_learned_of_the_engines(proxy: Proxy, vllm_engines: list[EngineClient]) -> None:
    await until(lambda: all(w.facts.num_blocks for w in proxy.services.pool))
    for worker in proxy.services.pool:
        assert worker.facts.engine == "vllm"
        assert worker.facts.block_size == 128
        assert worker.facts.num_blocks == 96
        assert worker.facts.max_model_len == 8192
    cards = (await proxy.client.get("/v1/models")).json()["data"]
    assert [(c["id"], c["max_model_len"]) for c in cards] == [("demo", 8192)]


async def test_exactness(proxy: Proxy, vllm_engines: list[EngineClient]) -> None:
    """Greedy float32 answers are equal directly and through the proxy, batched and on either engine."""
    prompts = [f"{'Tell me more. ' * (i % 5)}Topic {i}: {chr(97 + i) * i}" for i in range(24)]

    async def text(client: httpx.AsyncClient, base: str, prompt: str) -> str:
        answer = await client.post(base + CHAT, json=chat(prompt, **GREEDY), timeout=120)
        return str(answer.json()["choices"][0]["message"]["content"])

    async with http_client() as client:
        direct = [await text(client, vllm_engines[i % 2].url, p) for i, p in enumerate(prompts)]
        proxied = await asyncio.gather(*(text(client, proxy.url, p) for p in prompts))
    assert proxied == direct
    assert len(set(direct)) == len(prompts), "outputs that do not depend on the prompt would prove nothing"


async def test_the_prompt_is_known_token_for_token(proxy: Proxy, vllm_engines: list[EngineClient]) -> None:
    """The local tokenizer and chat template give the very ids that vLLM's `/tokenize` gives."""
    await until(lambda: proxy.services.tokenizers.get("demo"))
    tokenizer = proxy.services.tokenizers.get("demo")
    assert isinstance(tokenizer, LocalTokenizer)
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": "ü"}'}}
    user = {"role": "user", "content": "Hello,  naïve 東京 🙂\n\n x"}
    bodies: list[dict[str, Any]] = [
        {"messages": [user]},
        {
            "messages": [
                {"role": "system", "content": " Be brief. "},
                user,
                {"role": "assistant", "content": "ok "},
                user,
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": [user], "tools": tools},
        {
            "messages": [
                user,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "result"},
            ],
            "tools": tools,
        },
        {"messages": [user], "add_generation_prompt": False},
        {"messages": [user, user, user]},
    ]
    for body in bodies:
        theirs = vllm_engines[0].post("/tokenize", {"model": "demo", **body})["tokens"]
        assert list(tokenizer.request(CHAT, body)) == theirs, body
    for prompt in ("Once upon a time", " é\n", "<|im_start|>user"):
        theirs = vllm_engines[0].post("/tokenize", {"model": "demo", "prompt": prompt})["tokens"]
        assert list(tokenizer.request("/v1/completions", {"prompt": prompt})) == theirs


async def test_cached_tokens_are_predicted_exactly(proxy: Proxy) -> None:
    shared = " ".join(f"fact {i} of the matter." for i in range(90))
    asked = [f"{shared} Question {i}?" for i in range(4)]
    runs = {"workflow": "predict", "run": "p1"}
    for i, question in enumerate(asked):
        tags = {**runs, "node": f"n{i}", "parents": []}
        response = await proxy.chat(question, **{**GREEDY, "max_tokens": 2}, helium=tags)
        assert response.status_code == 200
    run = proxy.services.workflows.run("p1")
    assert run is not None
    nodes = sorted(run["nodes"], key=lambda n: n["node"])
    assert [n["cached_tokens"] for n in nodes][1:] == [n["predicted_cached_tokens"] for n in nodes][1:]
    assert all(n["cached_tokens"] >= 128 for n in nodes[1:])
    assert len({n["worker"] for n in nodes}) == 1, "calls go where their prefix is"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_the_engine_s_work(
    proxy: Proxy, vllm_engines: list[EngineClient], stream: bool
) -> None:
    body = chat(f"endless {stream}", max_tokens=4000, ignore_eos=True, temperature=0, stream=stream)

    async def busy() -> int:
        return sum([await running(e) for e in vllm_engines])

    async with http_client(proxy.url) as client:
        for _ in range(3):  # where the machine stops this process meanwhile, the engine ends the call unseen
            call = asyncio.create_task(client.post(CHAT, json=body, timeout=300))

            async def caught(call: asyncio.Task[Any] = call) -> bool:
                return call.done() or bool(await busy())

            await until(caught, within=20)
            if not call.done():
                break
        assert not call.done(), call
        call.cancel()

    async def idle() -> bool:
        return await busy() == 0

    await until(idle, within=1.0)
    await until(lambda: proxy.services.dispatcher.statistics().running == 0)


async def test_a_stream_comes_piece_by_piece(proxy: Proxy) -> None:
    """The first chunk is there while the engine still works."""
    async with proxy.stream("piece by piece", max_tokens=60, ignore_eos=True, temperature=1) as response:
        chunks = response.aiter_raw()
        await anext(chunks)
        assert sum(w.inflight for w in proxy.services.pool) == 1
        rest = [c async for c in chunks]
    assert len(rest) > 20
    found = events(b"".join(rest))
    assert found[-1] == (None, "[DONE]")


async def test_priority_orders_the_queue(vllm_engines: list[EngineClient]) -> None:
    stack = Stack()
    one = await stack.proxy(
        vllm_engines[0].url, dispatch={"max_running": 1, "default_running": 1}, reuse={"enabled": False}
    )
    done: list[str] = []

    async def call(name: str, **fields: Any) -> None:
        response = await one.chat(name, **{**GREEDY, **fields})
        assert response.status_code == 200, response.text
        done.append(name)

    calls = [asyncio.create_task(call("first", max_tokens=200))]
    await until(lambda: one.services.dispatcher.statistics().running == 1)
    for i, (name, priority) in enumerate((("late", 5), ("plain", 0), ("early", -5)), 1):
        calls.append(asyncio.create_task(call(name, helium={"priority": priority})))
        await until(lambda n=i: one.services.dispatcher.statistics().queued == n)
    await asyncio.gather(*calls)
    assert done == ["first", "early", "plain", "late"]
    assert (await one.chat("vendor", **GREEDY, priority=-3)).status_code == 200, "vLLM's own field, at the engine"
    await stack.close()


async def test_responses_have_the_id_the_engine_knows_them_by(proxy: Proxy) -> None:
    body = {"model": "demo", "input": "hello", "max_output_tokens": 4}
    response = await proxy.client.post("/v1/responses", json=body, headers={"X-Request-Id": "abc"})
    assert response.json()["id"] == "resp_abc"
    stored = await proxy.client.get("/v1/responses/resp_abc")
    assert stored.status_code in (200, 404), "stock vLLM stores none unless told to"


async def test_structured_output_is_what_was_asked_for(proxy: Proxy) -> None:
    """Random weights obey a grammar only because the engine makes them."""
    choice = await proxy.chat(
        "Judge this.", temperature=0, max_tokens=20, structured_outputs={"choice": ["good", "bad"]}
    )
    assert choice.json()["choices"][0]["message"]["content"] in ("good", "bad")
    regex = await proxy.chat("A number.", temperature=0, max_tokens=20, structured_outputs={"regex": "[0-9]{6}"})
    assert re.fullmatch("[0-9]{6}", regex.json()["choices"][0]["message"]["content"])
    form = {"type": "json_schema", "json_schema": {"name": "v", "schema": {"enum": ["a", "b"]}}}
    response = await proxy.chat("Judge this.", temperature=0, max_tokens=20, response_format=form)
    assert json.loads(response.json()["choices"][0]["message"]["content"]) in ("a", "b")


async def test_equal_calls_at_once_are_computed_once(vllm_engines: list[EngineClient]) -> None:
    stack = Stack()
    try:
        fresh = await stack.proxy(*(e.url for e in vllm_engines))
        answers = await asyncio.gather(*(fresh.chat("all the same", **GREEDY, stream=i % 2 == 0) for i in range(10)))
        assert {a.status_code for a in answers} == {200}
        results = sorted(a.headers["x-helium-cache"] for a in answers)
        assert results == ["coalesced"] * 8 + ["miss"] * 2, "one stream and one whole answer"
        again = await fresh.chat("all the same", **GREEDY)
        assert again.headers["x-helium-cache"] == "hit"
        whole = {orjson.loads(a.content)["choices"][0]["message"]["content"] for i, a in enumerate(answers) if i % 2}
        assert len(whole) == 1
    finally:
        await stack.close()


async def test_an_engine_killed_mid_run_costs_no_call(proxy: Proxy, vllm_engines: list[EngineClient]) -> None:
    """Last, since the engine has to come up again for whoever is next."""
    doomed = vllm_engines[1]
    if not isinstance(doomed, VllmEngine):
        pytest.skip("the engines were started elsewhere")
    sick = next(w for w in proxy.services.pool if w.spec.url == doomed.url)
    try:
        async with many_client() as client:

            async def call(i: int) -> tuple[int, str]:
                body = chat(f"question {i}", temperature=0, max_tokens=24, ignore_eos=True)
                async with client.post(proxy.url + CHAT, json=body) as response:
                    return response.status, (await response.json())["choices"][0]["message"]["content"]

            calls = [asyncio.create_task(call(i)) for i in range(60)]
            await until(lambda: sick.inflight >= 4, within=30)
            await asyncio.to_thread(doomed.kill)
            answers = await asyncio.gather(*calls)
        assert [status for status, _ in answers] == [200] * 60
        assert len({text for _, text in answers}) == 60
        await until(lambda: sick.state == "down")
        assert (await proxy.client.get("/ready")).status_code == 200
    finally:
        doomed.kill()
        doomed.start()
        await asyncio.to_thread(doomed.wait_ready)
    await until(lambda: sick.state == "up", within=20)
    assert sick.epoch >= 2, "its cache is gone, and that is known"
