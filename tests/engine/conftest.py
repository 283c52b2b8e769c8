"""A real HTTP server around an embedded engine, on a port the system chooses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
import pytest
import uvicorn

from helium_proxy.engine import EngineConfig, create_app


class Client:
    """What the tests ask of a running engine."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None)

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def metric(self, name: str) -> float:
        async with self.session.get(self.url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    async def until(self, name: str, value: float) -> None:
        """Wait for a metric to have a value."""
        async with asyncio.timeout(5):
            while await self.metric(name) != value:
                await asyncio.sleep(0.01)


Serve = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def serve() -> Serve:
    @contextlib.asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Client]:
        app = create_app(EngineConfig(**settings))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            async with aiohttp.ClientSession() as session:
                yield Client(f"http://127.0.0.1:{port}", session)
        finally:
            server.should_exit = True
            await task

    return start
