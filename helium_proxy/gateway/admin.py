"""The operator's routes under `/helium/`: runs, templates, workers, the cache. Callers that are not operators see
their own tenant's runs and templates, and nothing else."""

from dataclasses import asdict
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError

from helium_proxy.errors import Forbidden, InvalidRequest, NotFound, UpstreamFailed
from helium_proxy.gateway.auth import Principal
from helium_proxy.gateway.services import Services
from helium_proxy.workers.settings import WorkerSpec
from helium_proxy.workers.worker import Worker, worker_id


def admin_routes(services: Services) -> APIRouter:
    """All of them, over one `Services`."""

    def caller(request: Request) -> Principal:
        _refuse_other_sites(request)
        return services.keyring.authenticate({k.lower(): v for k, v in request.headers.items()})

    def operator(who: Annotated[Principal, Depends(caller)]) -> Principal:
        if not who.admin:
            raise Forbidden("This key may not use the operator's routes.")
        return who

    router = APIRouter(prefix="/helium", tags=["operator"])

    @router.get("/runs")
    async def runs(
        who: Annotated[Principal, Depends(caller)],
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        workflow: str | None = None,
        state: Literal["live", "done"] | None = None,
    ) -> dict[str, Any]:
        """The newest runs, each with its counts; and the proxy's mode: none is seen in passthrough."""
        found = services.workflows.runs(limit, workflow, state, _scope(who))
        return {"runs": found, "mode": services.settings.mode}

    @router.get("/runs/{run:path}", response_model=None)
    async def run(
        run: str,
        who: Annotated[Principal, Depends(caller)],
        format: Literal["json", "mermaid", "dot"] = "json",
    ) -> dict[str, Any] | PlainTextResponse:
        """One run's calls and edges."""
        tenant, flows = _scope(who), services.workflows
        found: dict[str, Any] | str | None
        if format == "json":
            found = flows.run(run, tenant)
        else:
            found = flows.mermaid(run, tenant) if format == "mermaid" else flows.dot(run, tenant)
        if found is None:
            raise NotFound(f"no run {run!r}", param="run")
        if isinstance(found, dict):
            expected = flows.expected(run, services.clock(), tenant)
            return {**found, "expected": [asdict(calls) for calls in expected]}
        return PlainTextResponse(found)

    @router.delete("/runs/{run:path}")
    async def end_run(run: str, who: Annotated[Principal, Depends(caller)]) -> dict[str, Any]:
        """Ends a live run: its template learns that nothing more comes."""
        if not services.workflows.end_run(run, _scope(who)):
            raise NotFound(f"no live run {run!r}", param="run")
        return {"run": run, "state": "done"}

    @router.get("/templates")
    async def templates(who: Annotated[Principal, Depends(caller)]) -> dict[str, Any]:
        """What has been learned of each workflow."""
        return {"templates": services.workflows.templates(_scope(who))}

    @router.get("/workers", dependencies=[Depends(operator)])
    async def workers() -> dict[str, Any]:
        return {"workers": [describe(services, w) for w in services.pool]}

    @router.post("/workers", status_code=201, dependencies=[Depends(operator)])
    async def add_worker(request: Request) -> dict[str, Any]:
        """Adds a worker: `{"url": …, "api_key": …}`."""
        worker = services.pool.add(_spec(await _json(request)))
        return describe(services, worker)

    @router.delete("/workers/{worker:path}", dependencies=[Depends(operator)])
    async def remove_worker(worker: str, drain_s: Annotated[float, Query(ge=0, le=3600)] = 30.0) -> dict[str, Any]:
        """Drains and removes a worker, by id or URL."""
        name = worker_id(worker) if "://" in worker else worker
        await services.pool.remove(name, drain_s=drain_s)
        kept = services.pool.get(name)  # added again meanwhile
        return {"id": name, "state": kept.state if kept is not None else "removed"}

    @router.get("/cache", dependencies=[Depends(operator)])
    async def cache() -> dict[str, Any]:
        return asdict(services.cache.statistics()) if services.cache is not None else {"entries": 0}

    @router.delete("/cache")
    async def purge(
        who: Annotated[Principal, Depends(caller)], model: str | None = None, workflow: str | None = None
    ) -> dict[str, Any]:
        """Drops cached answers: all, or those of a model or workflow; of the caller's tenant alone unless it is an
        operator."""
        if services.cache is None:
            return {"purged": 0}
        try:
            return {"purged": await services.cache.purge(tenant=_scope(who), model=model, workflow=workflow)}
        except Exception as error:
            raise UpstreamFailed(f"the prompt cache could not be purged: {error!r}") from error

    @router.get("/statistics", dependencies=[Depends(operator)])
    async def statistics() -> dict[str, Any]:
        """Every room's own count of itself."""
        coalescer, cache = services.coalescer, services.cache
        return {
            "workflow": asdict(services.workflows.statistics()),
            "dispatch": asdict(services.dispatcher.statistics()),
            "coalesce": asdict(coalescer.statistics()) if coalescer is not None else None,
            "cache": asdict(cache.statistics()) if cache is not None else None,
            "in_flight": services.in_flight,
            "draining": services.draining,
        }

    return router


def describe(services: Services, worker: Worker) -> dict[str, Any]:
    """A worker as `/helium/workers` lists it. Blocks, tokens per second."""
    facts = worker.facts
    known = services.dispatcher.state.workers.get(worker.id)
    residency = known.residency.statistics() if known else None
    rates = known.rates.statistics() if known else None
    budget = facts.pin_budget_blocks
    if budget is None and facts.num_blocks and facts.has_plugin:
        budget = int(facts.num_blocks * services.settings.directives.pin_share)
    return {
        "id": worker.id,
        "url": worker.spec.url,
        "models": [m.id for m in facts.models],
        "engine": facts.engine,
        "state": worker.state,
        "breaker": worker.breaker.state(services.clock()),
        "error": worker.last_error,
        "running": len(known.running) if known else 0,
        "engine_running": facts.running,
        "waiting": facts.waiting,
        "preemptions": facts.preemptions,
        "kv_usage": facts.kv_usage,
        "block_size": facts.block_size,
        "capacity_blocks": facts.num_blocks,
        "max_model_len": facts.max_model_len,
        "resident_blocks": residency.referenced + residency.free if residency else 0,
        "pinned_blocks": facts.pinned_blocks if facts.pinned_blocks is not None else 0,
        "pin_budget_blocks": budget,
        "plugin": facts.has_plugin,
        "pins": known.residency.pins() if known else {},
        "prefill_tokens_per_s": round(rates.prefill, 1) if rates and rates.windows else None,
        "decode_tokens_per_s": round(rates.decode, 1) if rates and rates.windows else None,
        "tokenizer": "exact" if any(services.tokenizers.get(m.id) for m in facts.models) else "text",
    }


def _refuse_other_sites(request: Request) -> None:
    """Browsers let any page send some requests to any address, without a look at the answer: one that its user had
    open could add a worker to a proxy that asks for no key. Browsers say whose the page is; nobody else does."""
    origin = request.headers.get("origin")
    if origin is None or request.method in ("GET", "HEAD"):
        return
    own = {request.headers.get("host"), request.headers.get("x-forwarded-host")}
    if urlsplit(origin).netloc not in own:
        raise Forbidden(f"not for pages of {origin}")


def _scope(who: Principal) -> str | None:
    return None if who.admin else who.tenant


def _spec(fields: dict[str, Any]) -> WorkerSpec:
    try:
        return WorkerSpec(**fields)
    except (ValidationError, TypeError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, problem["loc"])) or None
        raise InvalidRequest(f"{where or 'body'}: {problem['msg']}", param=where) from None


async def _json(request: Request) -> dict[str, Any]:
    try:
        fields = await request.json()
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be an object")
    return fields
