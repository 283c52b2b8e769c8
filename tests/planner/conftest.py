"""An application with the planner's routes over a fake port, in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from helium_proxy.errors import HeliumError, Unauthorized
from helium_proxy.gateway.workflows import PlanDeps, workflow_routes
from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.settings import PlanSettings
from tests.planner.fakes import FakePort


class Site:
    """`client` speaks as tenant ``t``; another tenant is a header away."""

    def __init__(self, port: FakePort, deps: PlanDeps) -> None:
        self.port = port
        self.deps = deps
        self.app = FastAPI()
        self.app.include_router(workflow_routes(deps))
        self.app.add_exception_handler(HeliumError, self._error)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app), base_url="http://proxy", headers={"x-tenant": "t"}
        )

    @staticmethod
    async def _error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HeliumError)
        return JSONResponse(error.body(), error.status, headers=error.headers())


def tenant_of(request: Request) -> str:
    if "x-tenant" not in request.headers:
        raise Unauthorized("who are you?")
    return request.headers["x-tenant"]


class Wall:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def sites(tmp_path: Path) -> AsyncIterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(port: FakePort | None = None, *, wall: Wall | None = None, **settings: Any) -> Site:
        port = port or FakePort()
        deps = PlanDeps(
            port,
            PlanSettings(**settings),
            workers=lambda: [PlanWorker("w0"), PlanWorker("w1")],
            wall=wall or Wall(),
            tenant_of=tenant_of,
        )
        made.append(Site(port, deps))
        return made[-1]

    yield make
    for site in made:
        await site.deps.close()
        await site.client.aclose()
