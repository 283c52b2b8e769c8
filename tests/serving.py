"""Real servers in the test's own event loop: the proxy, embedded engines, and workers that do as they are told.

All of them listen on port 0 of 127.0.0.1 and are reached over real sockets, so that streaming, disconnects and dying
connections are what they are in production.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import httpx
import orjson
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from helium_proxy.config import Settings, load
from helium_proxy.engine import EngineConfig
from helium_proxy.engine import create_app as engine_app
from helium_proxy.engine.profile import Profile
from helium_proxy.gateway.app import create_app
from helium_proxy.gateway.protocol import bounded_protocol
from helium_proxy.gateway.services import Services

CHAT = "/v1/chat/completions"
SLOW = Profile("slow", step_s=0.02, kv_tokens=1 << 20)
"""50 tokens per second and call: slow enough to be caught in the act."""


async def until(condition: Callable[[], Any], *, within: float = 10.0, what: str = "") -> Any:
    """Waits until `condition()` is true (a coroutine function may be given), at most `within` seconds."""
    end = time.monotonic() + within
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {within} s: {what or condition}")
        await asyncio.sleep(0.002)


class AppServer:
    """An ASGI app behind uvicorn, without its signal handlers and its leisurely main loop."""

    def __init__(self, app: ASGIApp, port: int = 0, http: Any = "httptools") -> None:
        config = uvicorn.Config(
            app, port=port, http=http, ws="none", lifespan="on", log_config=None, access_log=False
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self.port = port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> Self:
        await self._server.startup()
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def cut(self, client: tuple[str, int] | None = None) -> None:
        """Breaks the connection of `client`, or all of them, as a crash would."""
        for connection in list(self._server.server_state.connections):
            if client is None or connection.client == tuple(client):
                connection.transport.abort()

    def refuse(self) -> None:
        """Accepts no more connections."""
        for server in self._server.servers:
            server.close()

    async def kill(self) -> None:
        """No more connections, the present ones broken, what ran ended. The app's shutdown still runs."""
        self.refuse()
        for _ in range(5):  # connections that had been accepted are still coming up
            self.cut()
            await asyncio.sleep(0.002)
        tasks = list(self._server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        await self._server.lifespan.shutdown()


# -- a worker that does as it is told


@dataclass
class Seen:
    """A request as the fake worker saw it, and the means to answer it."""

    worker: FakeWorker
    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    client: tuple[str, int]
    receive: Receive = field(repr=False)
    send: Send = field(repr=False)

    @property
    def body(self) -> Any:
        return orjson.loads(self.raw)

    async def start(self, status: int = 200, content_type: str = "application/json", **headers: str) -> None:
        pairs = [(b"content-type", content_type.encode())]
        pairs += [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def json(self, value: Any, status: int = 200, **headers: str) -> None:
        await self.start(status, **headers)
        await self.write(orjson.dumps(value), more=False)

    async def open_stream(self) -> None:
        await self.start(200, "text/event-stream; charset=utf-8")

    async def event(self, value: Any) -> None:
        await self.write(b"data: " + orjson.dumps(value) + b"\n\n")

    async def delta(self, text: str, **choice: Any) -> None:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **choice}
        await self.event({**self.envelope("chat.completion.chunk"), "choices": [choice]})

    async def done(self, usage: bool = False) -> None:
        if usage:
            await self.event({**self.envelope("chat.completion.chunk"), "choices": [], "usage": USAGE})
        await self.write(b"data: [DONE]\n\n", more=False)

    def envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.headers.get('x-request-id', 'x')}",
            "object": kind,
            "created": 1,
            "model": self.worker.models[0],
        }

    def completion(self, text: str = "ok") -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {**self.envelope("chat.completion"), "choices": [choice], "usage": USAGE}

    def die(self) -> None:
        """Breaks this request's connection."""
        self.worker.server.cut(self.client)

    async def gone(self) -> None:
        """Returns when the client has left."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


USAGE = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
Behaviour = Callable[[Seen], Awaitable[None]]


async def answer(seen: Seen) -> None:
    """The default: a chat completion ``ok``, streamed if asked for."""
    if seen.raw and seen.body.get("stream"):
        await seen.open_stream()
        await seen.delta("o")
        await seen.delta("k", finish_reason="stop")
        await seen.done(bool((seen.body.get("stream_options") or {}).get("include_usage")))
    else:
        await seen.json(seen.completion())


class FakeWorker:
    """A vLLM look-alike whose answers a test scripts: `then` are used up in order, afterwards `always` holds."""

    def __init__(self, *models: str, always: Behaviour = answer, kv_blocks: int | None = None) -> None:
        self.models = models or ("demo",)
        self.always = always
        self.then: list[Behaviour] = []
        self.seen: list[Seen] = []
        self.health = 200
        self.kv_blocks = kv_blocks
        self.prompt_tokens = 0
        self.inside = 0
        """Calls being answered now."""
        self.most_inside = 0
        self.server: AppServer = AppServer(self)

    @property
    def url(self) -> str:
        return self.server.url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        headers = {k.decode(): v.decode("latin-1") for k, v in scope["headers"]}
        query = scope["query_string"].decode()
        path = scope["path"] + (f"?{query}" if query else "")
        seen = Seen(self, scope["method"], path, headers, raw, scope["client"], receive, send)
        if scope["path"] == "/health":
            await seen.json({}, self.health)
        elif scope["path"] == "/v1/models" and scope["method"] == "GET":
            await seen.json({"object": "list", "data": [self.card(m) for m in self.models]})
        elif scope["path"] == "/metrics":
            await seen.start(200, "text/plain")
            await seen.write(self.metrics().encode(), more=False)
        else:
            self.seen.append(seen)
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            try:
                await (self.then.pop(0) if self.then else self.always)(seen)
            finally:
                self.inside -= 1

    def card(self, model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "owned_by": "fake", "root": model, "max_model_len": 4096}

    def metrics(self) -> str:
        lines = [f'vllm:prompt_tokens_total{{model_name="{self.models[0]}"}} {self.prompt_tokens}']
        if self.kv_blocks is not None:
            lines.append(f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{self.kv_blocks}"}} 1.0')
        return "\n".join(lines) + "\n"


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


# -- an embedded engine, and the proxy


class Engine:
    """A served embedded engine."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.server = AppServer(engine_app(config))

    @property
    def url(self) -> str:
        return self.server.url

    async def running(self, client: httpx.AsyncClient) -> int:
        """Requests in the engine, running and waiting."""
        return int(await self.metric(client, "vllm:num_requests_running", "vllm:num_requests_waiting"))

    async def metric(self, client: httpx.AsyncClient, *names: str) -> float:
        text = (await client.get(f"{self.url}/metrics")).text
        starts = tuple(name + end for name in names for end in ("{", " "))
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(starts))


class Proxy:
    """A served proxy and a client of it."""

    def __init__(self, settings: Settings, port: int = 0) -> None:
        self.settings = settings
        self.app = create_app(settings)
        self.server = AppServer(self.app, port, bounded_protocol(settings.server.max_header_bytes))
        self.client = http_client()

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    async def start(self) -> Self:
        await self.server.start()
        self.client.base_url = httpx.URL(self.url)
        return self

    async def up(self, count: int) -> Self:
        """Waits until `count` workers are up."""
        await until(lambda: sum(w.state == "up" for w in self.services.pool) >= count, what="workers up")
        return self

    async def stop(self) -> None:
        await self.client.aclose()
        await self.server.kill()

    async def chat(self, text: str = "hello", /, **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        return await self.client.post(CHAT, json=chat(text, **fields), headers=headers)

    @contextlib.asynccontextmanager
    async def stream(self, text: str = "hello", /, **fields: Any) -> AsyncIterator[httpx.Response]:
        headers = fields.pop("headers", None)
        body = chat(text, stream=True, **fields)
        async with self.client.stream("POST", CHAT, json=body, headers=headers) as response:
            yield response


def http_client(url: str = "", **options: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1)  # vLLM: 5 s
    return httpx.AsyncClient(base_url=url, timeout=30, trust_env=False, verify=False, limits=limits, **options)


def many_client() -> aiohttp.ClientSession:
    """For hundreds of connections at once, where httpx takes seconds."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def chat(text: str = "hello", /, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **fields}


def events(raw: bytes) -> list[tuple[str | None, Any]]:
    """The events of an SSE body: name and data, parsed where it is JSON."""
    found: list[tuple[str | None, Any]] = []
    for block in raw.decode().replace("\r\n", "\n").split("\n\n"):
        name, data = None, []
        for line in block.split("\n"):
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
        if data:
            text = "\n".join(data)
            try:
                found.append((name, orjson.loads(text)))
            except orjson.JSONDecodeError:
                found.append((name, text))
    return found


class Stack:
    """Everything a test has started; all of it ends with the test."""

    def __init__(self) -> None:
        self._started: list[AppServer] = []
        self._proxies: list[Proxy] = []

    async def engine(self, **config: Any) -> Engine:
        engine = Engine(EngineConfig(**{"num_blocks": 4096, "block_size": 16, "max_model_len": 4096, **config}))
        self._started.append(await engine.server.start())
        return engine

    async def fake(self, *models: str, **options: Any) -> FakeWorker:
        worker = FakeWorker(*models, **options)
        self._started.append(await worker.server.start())
        return worker

    async def proxy(self, *workers: Engine | FakeWorker | str, wait: bool = True, **settings: Any) -> Proxy:
        """A proxy in front of `workers`; `settings` are sections, e.g. ``reuse={"enabled": False}``."""
        urls = [w if isinstance(w, str) else w.url for w in workers]
        overrides: dict[str, Any] = {"workers": [{"url": url} for url in urls], **settings}
        overrides["pool"] = {"metrics_interval_s": 0.2, "retry_down_s": 0.05, **settings.get("pool", {})}
        proxy = Proxy(load(overrides=overrides, environ={}))
        self._proxies.append(proxy)
        await proxy.start()
        return await proxy.up(len(urls)) if wait else proxy

    async def close(self) -> None:
        await asyncio.gather(*(p.stop() for p in self._proxies))
        await asyncio.gather(*(s.kill() for s in self._started))
