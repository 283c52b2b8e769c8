"""The harness and its client against an engine of thirty lines: what is counted, compared, retried and given up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmarks import plans
from benchmarks.client import CallFailed, HttpCaller, is_streamed
from benchmarks.engines import Engines
from benchmarks.harness import Harness, Plan, compare
from benchmarks.systems import find
from benchmarks.workloads import SIZES, WORKLOADS, Call, Writer, export_plan

BLOCK = 4


class FakeEngine:
    """A word is a token; blocks of four; unlimited KV; replies are a function of the prompt."""

    def __init__(self) -> None:
        self.cached: set[tuple[str, ...]] = set()
        self.prompt_tokens = self.cached_tokens = self.generated = self.resets = 0
        self.refuse = 0
        self.bodies: list[dict[str, Any]] = []

    def tokens(self, messages: list[dict[str, str]]) -> list[str]:
        return [word for message in messages for word in (message["role"], *message["content"].split())]

    def reply(self, body: dict[str, Any]) -> str:
        digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        return " ".join(digest[2 * index : 2 * index + 2] for index in range(body["max_tokens"]))

    def account(self, body: dict[str, Any]) -> None:
        words = self.tokens(body["messages"])
        hit = 0
        while (hit + 1) * BLOCK < len(words) and tuple(words[: (hit + 1) * BLOCK]) in self.cached:
            hit += 1
        self.prompt_tokens += len(words)
        self.cached_tokens += hit * BLOCK
        self.generated += body["max_tokens"]
        self.cached |= {tuple(words[:end]) for end in range(BLOCK, len(words) + 1, BLOCK)}

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.refuse:
            self.refuse -= 1
            return web.json_response({"error": {"message": "busy"}}, status=503)
        self.account(body)
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": self.reply(body)}}
            return web.json_response({"choices": [choice]})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        words = self.reply(body).split(" ")
        for index, word in enumerate(words):
            delta = {"content": word if index == 0 else f" {word}"}
            event = {"choices": [{"index": 0, "delta": delta}]}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')
        return response

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text=f"vllm:prompt_tokens_total {self.prompt_tokens}\n"
            f"vllm:prompt_tokens_cached_total {self.cached_tokens}\n"
            f"vllm:generation_tokens_total {self.generated}\n"
            "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"
            f'vllm:cache_config_info{{block_size="{BLOCK}",num_gpu_blocks="1000"}} 1\n'
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        words = self.tokens(body["messages"]) if "messages" in body else body["prompt"].split()
        return web.json_response({"tokens": [int(hashlib.sha256(w.encode()).hexdigest()[:8], 16) for w in words]})

    async def reset(self, request: web.Request) -> web.Response:
        self.cached.clear()
        self.resets += 1
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "demo"}]})

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/reset_prefix_cache", self.reset)
        app.router.add_get("/v1/models", self.models)
        return app


async def serve(app: web.Application) -> tuple[str, web.AppRunner]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}", runner


@pytest.fixture
async def engine() -> AsyncIterator[tuple[str, FakeEngine]]:
    fake = FakeEngine()
    url, runner = await serve(fake.app())
    yield url, fake
    await runner.cleanup()


def plan(shape: str, batch: int) -> Plan:
    return Plan(WORKLOADS[shape], SIZES["tiny"], batch=batch, seed=1, repeat=0, stream_every=4, time_scale=0.0)


async def test_one_engine_of_unlimited_kv_computes_exactly_the_minimum(engine: tuple[str, FakeEngine]) -> None:
    url, fake = engine
    async with aiohttp.ClientSession() as session:
        running = Engines("fake", [url])
        await running.learn(session)
        harness = Harness(running, session)
        await harness.learn()
        (measured,), outputs = await harness.measure(find("rr"), plan("debate", 3))
    assert harness.writer_scale == 1.0
    assert (measured.runs, measured.calls, measured.failed_calls) == (3, 18, 0)
    assert measured.computed_tokens == measured.minimum_tokens == measured.minimum_without_reuse
    assert measured.generated_tokens == 18 * SIZES["tiny"].output
    assert measured.balance == 1.0
    assert measured.proxy_cpu is None
    assert measured.ttft_p50 is not None
    assert len(outputs) == 18
    assert fake.resets == 1


async def test_two_days_are_two_measurements_and_known_inputs_cost_nothing(engine: tuple[str, FakeEngine]) -> None:
    url, _ = engine
    async with aiohttp.ClientSession() as session:
        running = Engines("fake", [url])
        await running.learn(session)
        harness = Harness(running, session)
        days, _ = await harness.measure(find("rr"), plan("two_day", 2))
    assert [day.phase for day in days] == [0, 1]
    assert days[0].calls == days[1].calls == 2 * 88
    assert days[1].minimum_tokens < 0.6 * days[0].minimum_tokens, "one of the two companies is as it was"
    assert days[1].computed_tokens > days[1].minimum_tokens, "an engine alone answers equal calls again"


async def test_streams_and_plain_replies_are_the_same_text(engine: tuple[str, FakeEngine]) -> None:
    url, fake = engine
    messages = ({"role": "user", "content": "hello"},)
    calls = [Call("w", f"run-{index}", "only", (), messages, 5) for index in range(16)]
    streamed = [is_streamed(call, 4) for call in calls]
    assert True in streamed
    assert False in streamed
    async with HttpCaller([url], "demo", stream_every=4) as caller:
        replies = {await caller.complete(call) for call in calls}
    assert len(replies) == 1
    assert [record.first_token is not None for record in caller.records] == streamed
    assert [bool(body.get("stream")) for body in fake.bodies] == streamed
    assert list(caller.prompts.values()) == [16]


async def test_refused_calls_are_retried_then_given_up(
    engine: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.client._BACKOFF_S", (0.0, 0.0))
    url, fake = engine
    call = Call("w", "r", "n", (), ({"role": "user", "content": "hello"},), 5)
    async with HttpCaller([url], "demo", stream_every=0) as caller:
        fake.refuse = 2
        await caller.complete(call)
        assert caller.records[0].retries == 2
        fake.refuse = 3
        with pytest.raises(CallFailed, match="503"):
            await caller.complete(call)
    assert len(caller.failures) == 1


async def test_a_failed_call_ends_its_run_only(
    engine: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.client._BACKOFF_S", (0.0, 0.0))
    url, fake = engine
    async with aiohttp.ClientSession() as session:
        running = Engines("fake", [url])
        await running.learn(session)
        fake.refuse = 3
        (measured,), outputs = await Harness(running, session).measure(find("rr"), plan("iterative", 1))
        assert (measured.runs, measured.failed_calls) == (0, 1)
        assert "503" in (measured.first_failure or "")
        compare({"rr": outputs}, [measured])
        assert measured.outputs_differ == 0


async def test_tagged_calls_carry_their_place(engine: tuple[str, FakeEngine]) -> None:
    url, fake = engine
    async with HttpCaller([url], "demo", find("helium").decorate) as caller:
        await caller.complete(Call("w", "r", "n", ("p",), ({"role": "user", "content": "x"},), 5))
    assert fake.bodies[0]["helium"] == {"workflow": "w", "run": "r", "node": "n", "parents": ["p"]}
    assert fake.bodies[0]["ignore_eos"] is True


async def test_a_plan_is_driven_by_its_events_and_compared_call_by_call() -> None:
    workload, sizes, writer = WORKLOADS["reflection"], SIZES["tiny"], Writer(1)
    runs = workload.make_inputs(writer, sizes, 2)[0]
    nodes = [n["id"] for n in (await export_plan(workload, sizes, writer, inputs=runs, model="demo"))["nodes"]]
    submitted: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = [
        {"input": 0, "status": "completed", "outputs": {node: f"reply of {node}" for node in nodes}},
        {"input": 1, "status": "failed", "outputs": {}, "errors": {"draft": "no worker"}},
    ]

    async def submit(request: web.Request) -> web.Response:
        submitted.append(await request.json())
        return web.json_response({"id": "wf_1"}, status=202)

    async def events(request: web.Request) -> web.Response:
        text = "".join(f"id: {i}\nevent: input\ndata: {json.dumps(row)}\n\n" for i, row in enumerate(rows))
        return web.Response(text=text + 'event: job\ndata: {"state": "partial"}\n\n')

    async def status(request: web.Request) -> web.Response:
        return web.json_response({"id": "wf_1", "results": rows})

    app = web.Application()
    app.router.add_post("/v1/workflows", submit)
    app.router.add_get("/v1/workflows/wf_1/events", events)
    app.router.add_get("/v1/workflows/wf_1", status)
    url, runner = await serve(app)
    try:
        async with HttpCaller([url], "demo") as caller:
            latencies = await plans.drive(caller, workload, sizes, runs, writer=writer, name="x")
    finally:
        await runner.cleanup()
    assert submitted[0]["outputs"] == nodes
    assert submitted[0]["inputs"] == runs
    assert list(latencies) == ["x-0"]
    assert {(r.run, r.node): r.reply for r in caller.records} == {("x-0", n): f"reply of {n}" for n in nodes}
    assert len(caller.prompts) == 4, "the prompts sent are found by replaying the program"
    assert "no worker" in caller.failures[0]
