"""What a client or a load balancer asks first: the models, the health, the metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from helium_proxy import __version__, metrics
from helium_proxy.errors import ModelNotFound
from helium_proxy.gateway.services import Services


def model_routes(services: Services) -> APIRouter:
    """`/v1/models`, `/health`, `/ready`, `/version`, `/metrics`."""
    router = APIRouter()

    def cards() -> dict[str, dict[str, Any]]:
        """The models of all workers that are up, by id; of equal ids the first worker's card."""
        union: dict[str, dict[str, Any]] = {}
        for worker in services.pool:
            if worker.state == "up":
                for model in worker.facts.models:
                    union.setdefault(model.id, model.raw)
        return union

    def authenticate(request: Request) -> None:
        services.keyring.authenticate(dict(request.headers))

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authenticate(request)
        return {"object": "list", "data": list(cards().values())}

    @router.get("/v1/models/{model:path}")
    async def model(model: str, request: Request) -> dict[str, Any]:
        authenticate(request)
        card = cards().get(model)
        if card is None:
            raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
        return card

    @router.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the process lives; its workers are another matter (`/ready`)."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> Response:
        """Whether calls should be sent here: some worker is up, and the process is not ending."""
        workers = services.pool.all()
        up = sum(1 for w in workers if w.state == "up")
        status = "draining" if services.draining or services.stopping else "ready" if up else "no worker is up"
        body = {"status": status, "workers_up": up, "workers": len(workers)}
        return JSONResponse(body, 200 if status == "ready" else 503)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics")
    async def exposition() -> Response:
        content, kind = metrics.render()
        return Response(content, media_type=kind)

    return router
