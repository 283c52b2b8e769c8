"""Plans in Python: what they become on the wire, and running them against a proxy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI

from helium_proxy.errors import InvalidRequest, UpstreamFailed
from helium_proxy.plan import Plan, PlanFailed, chat, completion, input_
from helium_proxy.planner.plan import parse_plan
from tests.planner.conftest import Site
from tests.planner.fakes import FakePort


def map_reduce() -> Plan:
    with Plan("map-reduce", model="demo", temperature=0) as plan:
        question = input_("question")
        experts = [chat(f"expert_{i}", system=f"You are expert {i}.", user=question, max_tokens=64) for i in range(2)]
        summary = chat("summary", user=f"{question}\n{experts[0]}\n{experts[1]}")
        chat("unused", user="x")
        plan.outputs(summary)
    return plan


def test_on_the_wire() -> None:
    assert map_reduce().to_dict([{"question": "Why?"}]) == {
        "workflow": "map-reduce",
        "model": "demo",
        "params": {"temperature": 0},
        "nodes": [
            {
                "id": f"expert_{i}",
                "messages": [
                    {"role": "system", "content": f"You are expert {i}."},
                    {"role": "user", "content": "{{inputs.question}}"},
                ],
                "params": {"max_tokens": 64},
            }
            for i in range(2)
        ]
        + [
            {
                "id": "summary",
                "messages": [
                    {
                        "role": "user",
                        "content": "{{inputs.question}}\n{{nodes.expert_0}}\n{{nodes.expert_1}}",
                    }
                ],
            },
            {"id": "unused", "messages": [{"role": "user", "content": "x"}]},
        ],
        "outputs": ["summary"],
        "inputs": [{"question": "Why?"}],
    }


def test_yaml_is_a_plan_file() -> None:
    rows = [{"question": "Why?\nAnd — how?"}]
    plan = map_reduce()
    assert yaml.safe_load(plan.to_yaml(rows)) == plan.to_dict(rows)
    assert "inputs" not in yaml.safe_load(plan.to_yaml())


def test_messages_and_completions() -> None:
    plan = Plan("w", model="m")
    first = plan.completion("a", input_("q"), model="other", max_tokens=3)
    plan.chat(
        "b",
        messages=[
            {"role": "user", "content": first},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        ],
    )
    with plan:
        completion("c", f"{first}!")
    found = parse_plan(plan.to_dict([{"q": "x"}]))
    assert found.parents == {"a": (), "b": ("a",), "c": ("a",)}
    assert found.spec.nodes[0].model == "other"
    assert repr(plan) == "<Plan 'w': 3 nodes>"


def test_mistakes_are_found_before_anything_is_sent() -> None:
    with pytest.raises(InvalidRequest, match="does not have"):
        map_reduce().to_dict([{"other": "x"}])
    with pytest.raises(RuntimeError, match="inside"):
        chat("a", user="x")
    plan = Plan("w", model="m")
    for given in ({}, {"user": "x", "messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(ValueError, match="give 'messages'"):
            plan.chat("a", **given)


class OtherLoop(httpx.BaseTransport):
    """Answers a synchronous client from an ASGI application on an event loop of its own."""

    def __init__(self, app: FastAPI) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.inner = httpx.ASGITransport(app=app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def answer() -> httpx.Response:
            content = request.read()
            inner = httpx.Request(request.method, request.url, headers=request.headers, content=content)
            response = await self.inner.handle_async_request(inner)
            body = await response.aread()
            return httpx.Response(response.status_code, headers=response.headers, content=body)

        return asyncio.run_coroutine_threadsafe(answer(), self.loop).result()

    def do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def proxies(sites: Any) -> Iterator[Any]:
    made: list[tuple[Site, OtherLoop, httpx.Client]] = []

    def make(port: FakePort) -> httpx.Client:
        site = sites(port)
        transport = OtherLoop(site.app)
        client = httpx.Client(transport=transport, headers={"x-tenant": "t"})
        made.append((site, transport, client))
        return client

    yield make
    for site, transport, client in made:
        transport.do(site.deps.close())
        client.close()


async def test_run(proxies: Any) -> None:
    client = proxies(FakePort(lambda seen: f"{seen.node}<{seen.text}>"))
    found = map_reduce().run([{"question": "Why?"}, {"question": "How?"}], base_url="http://proxy/v1", client=client)
    assert found[1] == {"summary": "summary<How?\nexpert_0<How?>\nexpert_1<How?>>"}
    assert len(found) == 2


async def test_run_says_what_failed(proxies: Any) -> None:
    def fail(seen: Any) -> Any:
        raise ZeroDivisionError

    client = proxies(FakePort(fail))
    with pytest.raises(PlanFailed, match=r"^1 of 1 input did not .*: input 0 failed \(summary: internal error\)"):
        map_reduce().run([{"question": "Why?"}], base_url="http://proxy/v1", client=client)
    client.headers.pop("x-tenant")
    with pytest.raises(InvalidRequest, match="401: who are you"):
        map_reduce().run([{"question": "Why?"}], base_url="http://proxy/v1", client=client)


async def test_what_came_out_is_kept_when_an_input_fails(proxies: Any) -> None:
    def fail(seen: Any) -> str:
        if seen.node == "second" and "How" in seen.text:
            raise UpstreamFailed("out of order")
        return f"{seen.node}<{seen.text}>"

    plan = Plan("pair", model="demo")
    plan.chat("first", user=input_("q"))
    plan.chat("second", user=input_("q"))
    client = proxies(FakePort(fail))
    with pytest.raises(PlanFailed) as caught:
        plan.run([{"q": "Why?"}, {"q": "How?"}], base_url="http://proxy/v1", client=client)
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.results == [{"first": "first<Why?>", "second": "second<Why?>"}, {"first": "first<How?>"}]
    assert list(caught.value.errors) == [1]
    assert caught.value.errors[1]["second"]["message"] == "out of order"


def test_an_input_that_was_cancelled_says_so() -> None:
    done = {"input": 0, "status": "completed", "outputs": {"a": "x"}}
    error = PlanFailed([done, {"input": 1, "status": "cancelled", "outputs": {}}])
    assert str(error) == "1 of 2 inputs did not complete: input 1 cancelled"
    assert (error.results, error.errors) == ([{"a": "x"}, {}], {1: {}})


async def test_a_plan_without_inputs_runs_once(proxies: Any) -> None:
    plan = Plan("w", model="demo")
    plan.chat("a", user="x")
    client = proxies(FakePort())
    assert plan.run(base_url="http://proxy/v1", client=client) == [{"a": "a(x)"}]
    plan.chat("b", user=input_("q"))
    with pytest.raises(InvalidRequest, match="does not have"):  # found before anything is sent
        plan.run(base_url="http://nowhere/v1", client=client)
