"""Memory stays bounded: nothing that a call leaves behind is kept for ever."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import orjson
import pytest
from serving import CHAT, Proxy, Stack

from helium_proxy.workers.upstream import UpstreamClient


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


class Canned:
    """A worker's answer without a worker, so that 10,000 calls take seconds."""

    status = 200
    headers = {"content-type": "application/json"}  # noqa: RUF012 -- never changed

    def __init__(self, headers: dict[str, str]) -> None:
        message = {"role": "assistant", "content": f"answer to {headers['x-request-id']}"}
        usage = {"prompt_tokens": 170, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self._body = orjson.dumps({"id": f"chatcmpl-{headers['x-request-id']}", "choices": choices, "usage": usage})

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        return self._body

    def close(self) -> None:
        pass


async def call(proxy: Proxy, i: int) -> int:
    """One call straight into the application, of a prompt and a run of its own; one in four is deterministic."""
    content = f"{i}: " + f"unique prefix {i} " * 40
    body: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": content}]}
    body["temperature"] = 1 if i % 4 else 0
    if i % 2:
        body["helium"] = {"workflow": f"w{i % 50}", "run": f"r{i}", "node": f"n{i % 7}"}
    statuses: list[int] = []
    requests = [{"type": "http.request", "body": orjson.dumps(body)}]

    async def receive() -> Any:
        if requests:
            return requests.pop()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
    await proxy.app(scope, receive, send)
    return statuses[0]


async def burst(proxy: Proxy, first: int, count: int) -> None:
    for start in range(first, first + count, 50):
        assert set(await asyncio.gather(*(call(proxy, i) for i in range(start, start + 50)))) == {200}


async def test_10_000_calls_with_unique_prefixes_leave_no_more_memory_than_1_000(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [await stack.fake(kv_blocks=512), await stack.fake(kv_blocks=512)]
    proxy = await stack.proxy(*workers)
    send = UpstreamClient.send

    async def canned(self: UpstreamClient, worker: Any, method: str, path: str, **more: Any) -> Any:
        return Canned(more["headers"]) if path == CHAT else await send(self, worker, method, path, **more)

    monkeypatch.setattr(UpstreamClient, "send", canned)
    await burst(proxy, 0, 1_000)
    gc.collect()
    before = resident_bytes()
    await burst(proxy, 1_000, 9_000)
    gc.collect()
    grown = resident_bytes() - before
    assert grown < 50 * 2**20, f"{grown / 2**20:.1f} MB"
    for state in proxy.services.dispatcher.state.workers.values():
        held = state.residency.statistics()
        assert held.referenced + held.anonymous + held.free <= 512
    statistics = proxy.services.dispatcher.statistics()
    assert (statistics.running, statistics.queued) == (0, 0)
