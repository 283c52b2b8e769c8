"""The HTTP face over a real socket, with vLLM's conventions."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest

from helium_proxy.engine import Scheduler
from helium_proxy.engine.profile import Profile

from .conftest import Client, Serve

CHAT = "/v1/chat/completions"
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "hello there, " * 8}], "max_tokens": 12}
SLOW = Profile("slow", step_s=0.02)


async def events(client: Client, path: str, body: dict[str, Any]) -> list[str]:
    """The data lines of a stream."""
    async with client.session.post(client.url + path, json={**body, "stream": True}) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        text = await answer.text()
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


async def test_chat_counts_tokens_and_finds_them_cached(serve: Serve) -> None:
    async with serve() as client:
        status, first = await client.post(CHAT, HELLO, **{"X-Request-Id": "mine"})
        assert (status, first["id"]) == (200, "chatcmpl-mine")
        _, second = await client.post(CHAT, HELLO)
        _, tokens = await client.post("/tokenize", {"messages": HELLO["messages"]})
        assert first["choices"] == second["choices"]
        usage = second["usage"]
        assert usage["prompt_tokens"] == tokens["count"] == len(tokens["tokens"])
        assert usage["completion_tokens"] == 12
        assert usage["prompt_tokens_details"]["cached_tokens"] == (tokens["count"] - 1) // 16 * 16
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert await client.metric("vllm:prompt_tokens_total") == 2 * tokens["count"]
        assert await client.metric("vllm:prompt_tokens_cached_total") == tokens["count"] // 16 * 16
        assert await client.metric("vllm:generation_tokens_total") == 24
        assert await client.metric("vllm:time_to_first_token_seconds_count") == 2
        assert await client.metric("vllm:inter_token_latency_seconds_count") == 22


async def test_a_stream_has_vllms_chunks(serve: Serve) -> None:
    async with serve() as client:
        _, whole = await client.post(CHAT, HELLO)
        lines = await events(client, CHAT, {**HELLO, "stream_options": {"include_usage": True}})
        assert lines[-1] == "[DONE]"
        chunks = [json.loads(line) for line in lines[:-1]]
        deltas = [c["choices"][0]["delta"] for c in chunks[:-1]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(d["content"] for d in deltas) == whole["choices"][0]["message"]["content"]
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * 12 + ["length"]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 12
        assert len({c["id"] for c in chunks}) == 1
        lines = await events(client, CHAT, HELLO)
        assert all("usage" not in json.loads(line) for line in lines[:-1])


async def test_tokens_are_sent_as_they_come(serve: Serve) -> None:
    async with serve(profile=SLOW) as client:
        body = {**HELLO, "max_tokens": 6, "stream": True}
        async with client.session.post(client.url + CHAT, json=body) as answer:
            arrivals = [time.monotonic() async for line in answer.content if line.startswith(b"data: {")]
        assert len(arrivals) == 7
        assert arrivals[-1] - arrivals[1] > 3 * 0.02  # five steps of 20 ms lie between; buffered, it would be none


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_has_its_request_aborted(serve: Serve, stream: bool) -> None:
    async with serve(profile=SLOW) as client:
        body = {**HELLO, "max_tokens": 10_000, "ignore_eos": True, "stream": stream}
        task = asyncio.create_task(client.session.post(client.url + CHAT, json=body))  # type: ignore[arg-type]
        await client.until("vllm:num_requests_running", 1)
        if stream:
            (await task).close()
        else:
            task.cancel()
        await client.until("vllm:num_requests_running", 0)
        assert await client.metric("vllm:kv_cache_usage_perc") == 0
        assert await client.metric("vllm:request_success_total") == 1
        assert (await client.get("/load"))["server_load"] == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, {**HELLO, "model": "other"}, 404, "model"),
        (CHAT, {**HELLO, "messages": []}, 400, "messages"),
        (CHAT, {**HELLO, "messages": [3]}, 400, "messages"),
        (CHAT, {**HELLO, "max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {**HELLO, "max_tokens": "x"}, 400, "max_tokens"),
        (CHAT, {**HELLO, "n": 0}, 400, "n"),
        (CHAT, {**HELLO, "stop": 3}, 400, "stop"),
        (CHAT, {**HELLO, "temperature": -1}, 400, "temperature"),
        (CHAT, {**HELLO, "tool_choice": "required"}, 400, "tool_choice"),
        (CHAT, {**HELLO, "response_format": {"type": "xml"}}, 400, "response_format"),
        (CHAT, {**HELLO, "messages": [{"role": "user", "content": "word " * 300}]}, 400, "input_tokens"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x", "logprobs": 99}, 400, "logprobs"),
        ("/v1/responses", {}, 400, "input"),
        ("/v1/responses", {"input": "x", "previous_response_id": "no"}, 404, "response_id"),
        ("/v1/no/such/route", {}, 404, None),
        ("/v1/models", {}, 405, None),
        ("/tokenize", {}, 400, "prompt"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/v1/embeddings", {"input": None}, 400, "input"),
        ("/v1/rerank", {"query": "x", "documents": []}, 400, "documents"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, 400, "text_1"),
        ("/engine/faults", {"kind": "flood"}, 400, "kind"),
    ],
)
async def test_errors_have_vllms_form(serve: Serve, path: str, body: Any, status: int, param: str | None) -> None:
    async with serve(max_model_len=256) as client:
        got, answer = await client.post(path, body)
        assert got == status
        assert answer["error"]["param"] == param
        assert answer["error"]["code"] == status
        assert answer["error"]["message"]
        assert await client.metric("vllm:num_requests_running") == 0


async def test_bodies_that_are_not_json_objects(serve: Serve) -> None:
    async with serve() as client:
        for data in (b"{bad", b"[1]", b"\xff"):
            async with client.session.post(client.url + CHAT, data=data) as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["type"] == "BadRequestError"


async def test_a_key_guards_only_v1(serve: Serve) -> None:
    async with serve(api_key="s3cret") as client:
        assert await client.post(CHAT, HELLO) == (401, {"error": "Unauthorized"})
        assert (await client.post(CHAT, HELLO, Authorization="Bearer wrong"))[0] == 401
        assert (await client.post(CHAT, HELLO, Authorization="Bearer s3cret"))[0] == 200
        assert (await client.post("/tokenize", {"prompt": "x"}))[0] == 200


async def test_completions_take_texts_and_tokens(serve: Serve) -> None:
    async with serve() as client:
        _, tokens = await client.post("/tokenize", {"prompt": "Once upon a time", "return_token_strs": True})
        assert "".join(tokens["token_strs"]) == "Once upon a time"
        body = {"prompt": ["Once upon a time", "another"], "max_tokens": 5, "n": 2, "logprobs": 2}
        _, texts = await client.post("/v1/completions", body)
        _, ids = await client.post("/v1/completions", {"prompt": tokens["tokens"], "max_tokens": 5})
        assert len({c["text"] for c in texts["choices"]}) == 4
        assert ids["choices"][0]["text"] == texts["choices"][0]["text"]
        assert texts["usage"]["prompt_tokens"] == tokens["count"] + 1
        assert texts["usage"]["completion_tokens"] == 20
        probs = texts["choices"][3]["logprobs"]
        assert "".join(probs["tokens"]) == texts["choices"][3]["text"]
        assert all(len(top) == 2 for top in probs["top_logprobs"])
        assert (await client.post("/detokenize", {"tokens": tokens["tokens"]}))[1]["prompt"] == "Once upon a time"
        streamed = [json.loads(x) for x in (await events(client, "/v1/completions", body))[:-1]]
        for i, choice in enumerate(texts["choices"]):
            pieces = [c["choices"][0]["text"] for c in streamed if c["choices"][0]["index"] == i]
            assert "".join(pieces) == choice["text"]


async def test_a_cache_salt_keeps_prefixes_apart(serve: Serve) -> None:
    async with serve() as client:
        cached = []
        for salt in ("a", "b", "a"):
            _, answer = await client.post(CHAT, {**HELLO, "cache_salt": salt})
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[:2] == [0, 0]
        assert cached[2] > 0


async def test_pin_directives_are_answered(serve: Serve) -> None:
    async with serve(num_blocks=101, pin_budget=0.5) as client:
        body = {**HELLO, "kv_transfer_params": {"helium": {"pin": "p"}}}
        _, answer = await client.post(CHAT, body)
        blocks = answer["usage"]["prompt_tokens"] // 16
        assert answer["kv_transfer_params"] == {"helium": {"pinned_blocks": blocks, "budget_blocks": 50}}
        assert await client.metric("vllm:kv_cache_usage_perc") == pytest.approx(blocks / 100)
        assert (await client.post(CHAT, HELLO))[1]["kv_transfer_params"] is None


async def test_the_cache_can_be_reset(serve: Serve) -> None:
    async with serve() as client:
        await client.post(CHAT, HELLO)
        async with client.session.post(client.url + "/reset_prefix_cache") as answer:
            assert answer.status == 200
        _, again = await client.post(CHAT, HELLO)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_models_version_and_cache_facts(serve: Serve) -> None:
    async with serve(model="m", block_size=32, num_blocks=11) as client:
        card = (await client.get("/v1/models"))["data"][0]
        assert (card["id"], card["root"], card["max_model_len"]) == ("m", "m", 320)
        assert card["owned_by"] == "helium-engine"
        assert (await client.get("/version"))["version"]
        assert await client.get("/kv_event_sources") == {}
        async with client.session.get(client.url + "/metrics") as answer:
            text = await answer.text()
        info = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info"))
        for fact in ('block_size="32"', 'num_gpu_blocks="11"', 'kv_cache_size_tokens="320"'):
            assert fact in info


async def test_vectors_rank_what_is_alike_first(serve: Serve) -> None:
    async with serve() as client:
        _, made = await client.post("/v1/embeddings", {"input": ["a cat", "a dog"], "dimensions": 64})
        assert [len(d["embedding"]) for d in made["data"]] == [64, 64]
        body = {"query": "the price of gold", "documents": ["weather report", "gold price", "gold"], "top_n": 2}
        _, ranked = await client.post("/v1/rerank", body)
        assert len(ranked["results"]) == 2
        assert ranked["results"][0]["index"] != 0
        _, scored = await client.post("/v1/score", {"text_1": "x y z", "text_2": ["x y z", "q"]})
        assert scored["data"][0]["score"] == pytest.approx(1.0)
        assert scored["data"][1]["score"] < 0.9


async def test_faults_come_as_ordered(serve: Serve) -> None:
    async with serve() as client:
        await client.post("/engine/faults", {"kind": "error", "count": 2, "status": 503})
        assert [(await client.post(CHAT, HELLO))[0] for _ in range(3)] == [503, 503, 200]

        await client.post("/engine/faults", {"kind": "die"})
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.post(CHAT, HELLO)
        assert (await client.post(CHAT, HELLO))[0] == 200

        await client.post("/engine/faults", {"kind": "die", "after_tokens": 3})
        with pytest.raises(aiohttp.ClientPayloadError):
            await events(client, CHAT, HELLO)

        await client.post("/engine/faults", {"kind": "stream_error"})
        lines = await events(client, CHAT, HELLO)
        assert json.loads(lines[-2])["error"]["code"] == 500
        assert lines[-1] == "[DONE]"

        await client.post("/engine/faults", {"kind": "unhealthy"})
        for status in (503, 200):
            async with client.session.get(client.url + "/health") as answer:
                assert answer.status == status

        await client.post("/engine/faults", {"kind": "hang", "jitter": 0.5})
        assert (await client.get("/engine/faults"))["faults"][0]["kind"] == "hang"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.post(CHAT, HELLO)
        async with client.session.delete(client.url + "/engine/faults") as answer:
            assert (await answer.json()) == {"faults": [], "jitter": 0.0}
        assert (await client.post(CHAT, HELLO))[0] == 200


async def test_time_passes_as_the_profile_says(serve: Serve) -> None:
    async with serve(profile=Profile("steady", step_s=0.05), time_scale=2.0) as client:
        start = time.monotonic()
        answers = await asyncio.gather(*(client.post(CHAT, {**HELLO, "max_tokens": 9}) for _ in range(4)))
        took = time.monotonic() - start
        assert all(status == 200 for status, _ in answers)
        assert 9 * 0.025 <= took < 5
        assert 9 * 0.05 <= await client.metric("vllm:e2e_request_latency_seconds_sum") / 4 <= 2 * took


@pytest.mark.parametrize("stream", [False, True])
async def test_a_dead_engine_leaves_nobody_waiting(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async with serve(profile=SLOW) as client:
        body = {**HELLO, "max_tokens": 500, "ignore_eos": True, "stream": stream}

        async def ask() -> tuple[int, str]:
            async with client.session.post(client.url + CHAT, json=body) as answer:
                return answer.status, await answer.text()

        task = asyncio.create_task(ask())
        await client.until("vllm:num_requests_running", 1)
        monkeypatch.setattr(Scheduler, "finish", lambda self: 1 / 0)
        status, text = await task
        assert status == (200 if stream else 500)
        assert "the engine is down" in text
        assert text.endswith("data: [DONE]\n\n") is stream
        assert (await client.post(CHAT, HELLO))[0] == 500
        async with client.session.get(client.url + "/health") as answer:
            assert answer.status == 503
        assert "ZeroDivisionError" in caplog.text
