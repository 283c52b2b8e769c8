"""What goes to the worker with a call, and what comes back to the client with its answer."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from serving import CHAT, Seen, Stack, answer, chat, until

_OWN = {"workflow": "w", "run": "r1", "node": "n", "parents": [], "final": False, "priority": 2, "deadline_ms": 9000}


async def test_helium_s_own_fields_and_headers_are_stripped(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    body = chat(
        helium=_OWN,
        metadata={"helium.workflow": "w", "mine": "kept"},
        kv_transfer_params={"helium": {"pin": "x"}, "do_remote_decode": False},
        tools=[],
        vllm_xargs={"agentic_context": '{"program_id": "p"}', "mine": 1},
    )
    headers = {
        "X-Helium-Run": "r1",
        "x-helium-anything": "1",
        "Baggage": "helium.node=n,mine=kept",
        "X-Mine": "kept",
        "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    response = await proxy.client.post(CHAT, json=body, headers=headers)
    assert response.status_code == 200
    (seen,) = worker.seen
    assert "helium" not in str(seen.body)
    assert seen.body["metadata"]["mine"] == "kept"
    assert seen.body["kv_transfer_params"] == {"do_remote_decode": False}
    assert seen.body["vllm_xargs"]["mine"] == 1
    assert not [h for h in seen.headers if h.startswith("x-helium")]
    assert "helium" not in seen.headers.get("baggage", "")
    assert "mine=kept" in seen.headers.get("baggage", "")
    assert seen.headers["x-mine"] == "kept"
    assert seen.headers["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c")


async def test_routes_that_pass_are_stripped_of_them_too(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    body = chat(
        helium=_OWN,
        kv_transfer_params={"helium": {"pin": "x"}},
        vllm_xargs={"kv_cache_report_mode": "full", "mine": 1},
        seed=2**70,
    )
    await proxy.client.post(f"{CHAT}/batch", json=body)
    assert worker.seen[-1].body == chat(vllm_xargs={"mine": 1}, seed=2**70)
    await proxy.client.post(f"{CHAT}/batch", json=chat(vllm_xargs={"kv_cache_report_mode": "full"}))
    assert worker.seen[-1].body == chat()
    raw = b'{ "model":"demo", "n" : 1.0, "vllm_xargs": {"mine": 1}, "cache_salt": "mine" }'
    await proxy.client.post(f"{CHAT}/batch", content=raw)
    assert worker.seen[-1].raw == raw


async def test_a_body_without_tags_reaches_the_worker_byte_for_byte(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    raw = (
        b' {"model" : "demo","messages":[{"role":"user","content":"\\u00e9 \xc3\xa9 1e9"}], "top_p": 1.0, "x": 1e2}\n'
    )
    await proxy.client.post(CHAT, content=raw, headers={"Content-Type": "application/json; charset=utf-8"})
    assert worker.seen[0].raw == raw
    assert worker.seen[0].headers["content-type"] == "application/json; charset=utf-8"
    assert worker.seen[0].headers["accept-encoding"] == "identity", "answers are read here as they come"


async def test_paths_and_queries_reach_the_worker_as_they_were(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    await proxy.client.post(f"{CHAT}?api-version=1&x=a%2Fb", json=chat())
    await proxy.client.get("/v1/other/a%20b/content?x=%C3%A9")
    assert [s.path for s in worker.seen] == [f"{CHAT}?api-version=1&x=a%2Fb", "/v1/other/a b/content?x=%C3%A9"]


async def test_a_redirect_names_no_worker(stack: Stack) -> None:
    """FastAPI's for a slash too many, say: the worker's address is none that a client can reach."""
    location = ""

    async def send_on(seen: Seen) -> None:
        if seen.path == f"/base{CHAT}/":
            await seen.json({}, 307, location=location)
        else:
            await seen.json({"object": "list", "data": [seen.worker.card("demo")]})

    worker = await stack.fake(always=send_on)
    proxy = await stack.proxy(f"{worker.url}/base")
    for there, here in (
        (f"{worker.url}/base{CHAT}?a=b%20c#d", f"{CHAT}?a=b%20c#d"),
        (f"{worker.url}{CHAT}".replace("http:", "https:"), CHAT),
        (f"{worker.url}/baseless", "/baseless"),
        (f"{worker.url}/base//elsewhere", "/elsewhere"),
        (worker.url, "/"),
        (worker.url.rpartition(":")[0] + CHAT, worker.url.rpartition(":")[0] + CHAT),
        ("https://elsewhere/x", "https://elsewhere/x"),
        ("/v1/x?y", "/v1/x?y"),
        ("http://[", "http://["),
    ):
        location = there
        response = await proxy.client.post(f"{CHAT}/", json=chat())
        assert (response.status_code, response.headers["location"]) == (307, here)


async def test_the_answer_s_headers(stack: Stack) -> None:
    async def answer(seen: Seen) -> None:
        await seen.json(seen.completion(), x_vllm="kept", connection="close", x_request_id="theirs", date="then")

    proxy = await stack.proxy(await stack.fake(always=answer))
    response = await proxy.chat(helium={"workflow": "w", "run": "r-é", "node": "n"}, temperature=0)
    headers = response.headers
    assert headers["x-helium-run"] == "r-_"
    assert headers["x-helium-node"] == "n"
    assert headers["x-helium-cache"] == "miss"
    assert headers["x-helium-worker"] == proxy.services.pool.all()[0].id
    assert re.fullmatch(r"plan;dur=[\d.]+, queue;dur=[\d.]+, upstream;dur=[\d.]+", headers["server-timing"]), headers[
        "server-timing"
    ]
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"]), "ours, and only one"
    assert headers["x-vllm"] == "kept"
    assert "age" not in headers
    hit = await proxy.chat(helium={"workflow": "w", "run": "r-é", "node": "n"}, temperature=0)
    assert hit.headers["x-helium-cache"] == "hit"
    assert hit.headers["x-helium-node"] == "n#2"
    assert int(hit.headers["age"]) >= 0
    assert (await proxy.chat(temperature=1)).headers["x-helium-cache"] == "bypass"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_request_s_id_is_the_response_s(stack: Stack, stream: bool) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    response = await proxy.chat(headers={"X-Request-Id": "trace-1"}, stream=stream, temperature=0)
    assert response.headers["x-request-id"] == "trace-1"
    assert b'"chatcmpl-trace-1"' in response.content
    assert worker.seen[0].headers["x-request-id"] == "trace-1"
    again = await proxy.chat(headers={"X-Request-Id": "trace-2"}, stream=stream, temperature=0)
    assert again.headers["x-helium-cache"] == "hit"
    assert b'"chatcmpl-trace-2"' in again.content, "every response has an id of its own"
    assert b"trace-1" not in again.content
    in_body = await proxy.chat("other", request_id="trace-3", temperature=1)
    assert in_body.headers["x-request-id"] == "trace-3", "vLLM takes it from the body as well"


async def test_an_id_fit_for_no_log_is_replaced(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    for bad in ("x" * 300, "a b", "a;b", "ü".encode("latin-1")):
        response = await proxy.client.post(CHAT, json=chat(), headers=[(b"X-Request-Id", bad)])  # type: ignore[list-item]
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


async def test_errors_name_the_request(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.fake(), server={"max_body_bytes": 1024})
    response = await proxy.chat("x" * 2000, headers={"X-Request-Id": "trace-9"})
    assert response.status_code == 413
    assert response.headers["x-request-id"] == "trace-9"


async def test_a_call_s_priority_is_the_client_s_own_where_it_says_one(stack: Stack) -> None:
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    await proxy.chat(priority=7)
    assert worker.seen[0].body["priority"] == 7


async def test_calls_that_share_a_request_id_are_still_calls_of_their_own(stack: Stack) -> None:
    """Clients pass one trace id on with every call of a run."""
    release = asyncio.Event()

    async def wait(seen: Seen) -> None:
        await release.wait()
        await answer(seen)

    worker = await stack.fake(always=wait)
    proxy = await stack.proxy(worker, await stack.fake(always=wait))
    same = {"X-Request-Id": "trace"}
    calls = [asyncio.create_task(proxy.chat(str(i), headers=same, stream=i % 2 == 0)) for i in range(8)]
    await until(lambda: proxy.services.in_flight == 8)
    release.set()
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*calls)
    assert [a.status_code for a in answers] == [200] * 8
    statistics = proxy.services.dispatcher.statistics()
    assert (statistics.running, statistics.queued) == (0, 0)
    assert all(w.inflight == 0 for w in proxy.services.pool)
    (calls_seen,) = [sum(r["calls"] for r in proxy.services.workflows.runs(100, None, None))]
    assert calls_seen == 8


@pytest.mark.parametrize("tags", [{}, {"helium": {"workflow": "w"}}], ids=["untagged", "tagged"])
async def test_numbers_reach_the_engine_as_they_were_written(stack: Stack, tags: dict[str, object]) -> None:
    async def any_body(seen: Seen) -> None:
        await seen.json(seen.completion())

    worker = await stack.fake(always=any_body)
    proxy = await stack.proxy(worker)
    largest = 2**256 - 1
    body = {**chat(min_p=float("nan"), tools=[{"maximum": largest, "id": 1234567890123456789012}]), **tags}
    response = await proxy.client.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 200
    sent = json.loads(worker.seen[-1].raw)
    assert sent["tools"] == [{"maximum": largest, "id": 1234567890123456789012}]
    assert sent["min_p"] != sent["min_p"], "NaN"
    assert "helium" not in sent


async def test_a_browser_s_question_before_its_call_needs_no_key(stack: Stack) -> None:
    async def allow(seen: Seen) -> None:
        await seen.start(200, access_control_allow_origin="*")
        await seen.write(b"", more=False)

    worker = await stack.fake(always=allow)
    proxy = await stack.proxy(worker, auth={"keys": [{"key": "sk-1", "tenant": "t"}]})
    answer = await proxy.client.options(CHAT, headers={"origin": "https://page.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    assert (await proxy.client.get("/v1/models")).status_code == 401


async def test_what_the_engine_says_of_a_directive_is_not_the_client_s(stack: Stack) -> None:
    async def report(seen: Seen) -> None:
        await seen.json({**seen.completion(), "kv_transfer_params": {"helium": {"pinned_blocks": 4}}})

    proxy = await stack.proxy(await stack.fake(always=report))
    for _ in range(2):
        answer = await proxy.chat(temperature=0)
        assert answer.json()["kv_transfer_params"] is None
    assert answer.headers["x-helium-cache"] == "hit"
