"""The application: services put together, routes mounted, errors in one form, start and end."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helium_proxy import __version__, metrics
from helium_proxy.config import Settings
from helium_proxy.dispatch.dispatcher import Dispatcher
from helium_proxy.errors import HeliumError, InvalidRequest, NotFound, Unauthorized
from helium_proxy.gateway.admin import admin_routes
from helium_proxy.gateway.ahead import Ahead
from helium_proxy.gateway.auth import Keyring
from helium_proxy.gateway.events import EventFeeds
from helium_proxy.gateway.llm import PLANNED, LlmRoutes
from helium_proxy.gateway.models import model_routes
from helium_proxy.gateway.port import plan_deps
from helium_proxy.gateway.run_metrics import RunMetrics
from helium_proxy.gateway.services import Background, Services
from helium_proxy.gateway.tracing import make_tracer, run_name
from helium_proxy.gateway.workflows import workflow_routes
from helium_proxy.planner.estimate import Estimator
from helium_proxy.residency.registry import Tokenizers
from helium_proxy.reuse import Coalescer, build_cache
from helium_proxy.ui import ui_routes
from helium_proxy.workers.pool import Pool
from helium_proxy.workers.probe import Probe
from helium_proxy.workers.upstream import UpstreamClient
from helium_proxy.workers.worker import Worker
from helium_proxy.workflow import SqliteTemplateStore, Workflows

log = structlog.get_logger(__name__)

_TICK_S = 1.0


class Endpoint:
    """A raw ASGI endpoint as a route's target (Starlette wraps plain functions, and leaves other callables be)."""

    def __init__(self, serve: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._serve = serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send)


_PROBED = frozenset({"/health", "/ready", "/metrics"})
"""Asked all the time, and not by clients."""


class App(FastAPI):
    """FastAPI, whose layers the calls go around: each of them costs a call more than finding its route does, and what
    they offer (documented parameters, error pages) calls have of their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # -- state: by path, POST only; filled as the application starts
        self.planned: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        planned = self.planned.get(scope["path"]) if scope["method"] == "POST" else None
        if planned is not None:
            await planned(scope, receive, send)
            return
        status = 499  # unless there is an answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await super().__call__(scope, receive, noting)
        finally:
            if scope["path"] not in _PROBED:
                route = "operator" if scope["path"].startswith("/helium") else "other"
                metrics.HTTP_REQUESTS.labels(route, status).inc()


def build_services(settings: Settings) -> Services:
    """Everything the gateway works with. Needs a running event loop; starts no task and opens no connection. Raises
    ConfigError where a setting cannot be followed."""
    keyring = Keyring(settings.auth)  # first, like what follows: each may be refused
    reuse = settings.reuse
    cache = build_cache(reuse)
    tracer = make_tracer(
        enabled=settings.tracing.enabled,
        service_name=settings.tracing.service_name,
        endpoint=settings.tracing.endpoint,
    )
    client = UpstreamClient(settings.pool)
    background = Background()
    tokenizers = Tokenizers(client)
    probe = Probe(client, enabled=settings.pool.probe, calibrate=settings.pool.calibrate)

    async def meet(worker: Worker) -> None:
        await asyncio.gather(tokenizers.learn(worker), probe.learn(worker))
        await events.follow(worker)
        await probe.time_alone(worker)
        if pool.get(worker.id) is worker:
            dispatcher.worker_changed(worker)

    def changed(worker: Worker) -> None:
        metrics.start_worker(worker.id)
        probe.changed(worker)
        dispatcher.worker_changed(worker)
        if worker.state == "up":
            background.start(meet(worker))

    def gone(worker: Worker) -> None:
        probe.gone(worker)
        dispatcher.worker_gone(worker)
        background.start(events.gone(worker))

    pool = Pool(settings.pool, client, on_change=changed, on_gone=gone, clock=time.monotonic)
    plain = settings.mode == "passthrough"
    dispatcher = Dispatcher(settings.dispatch, pool, clock=time.monotonic, at_once=plain)
    events = EventFeeds(client, tokenizers, dispatcher.state, enabled=settings.pool.kv_events)
    store = SqliteTemplateStore(settings.store.path) if settings.store.path else None
    workflows = Workflows(settings.workflow, store)
    ahead = Ahead(settings.directives, pool, client, dispatcher.state, tokenizers, workflows, clock=time.monotonic)
    return Services(
        settings=settings,
        clock=time.monotonic,
        wall=time.time,
        client=client,
        pool=pool,
        dispatcher=dispatcher,
        tokenizers=tokenizers,
        estimator=Estimator(tokenizers, default_output_tokens=settings.dispatch.default_output_tokens),
        workflows=workflows,
        cache=cache,
        coalescer=Coalescer(reuse.coalesce_window_bytes) if reuse.coalesce else None,
        keyring=keyring,
        background=background,
        events=events,
        ahead=ahead,
        tracer=tracer,
    )


async def prepare(app: FastAPI, settings: Settings) -> Services:
    """The services, put together before the application starts, so that what is wrong with the settings is said
    plainly. Raises InvalidRequest (ConfigError, mostly) and OSError."""
    assert isinstance(app, App)
    metrics.sweep()
    services = build_services(settings)
    try:
        _mount(app, services)
        for spec in settings.workers:
            services.pool.add(spec)
    except BaseException:
        await _close(services)
        raise
    app.state.services = services
    return services


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application; `app.state.services` is there once it has started, or was prepared."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        prepared: Services | None = getattr(app.state, "services", None)
        services = prepared or await prepare(app, settings)
        if services.keyring.open:
            log.warning("no API key is configured: everybody who can reach this address may call")
        services.background.start(_tick(services))
        services.background.start(services.ahead.run())
        try:
            yield
        finally:
            await _close(services)

    app = App(
        title="helium-proxy",
        version=__version__,
        description="OpenAI-compatible proxy that schedules agent workflows on vLLM workers.",
        lifespan=lifespan,
        docs_url="/helium/docs",
        redoc_url=None,
        openapi_url="/helium/openapi.json",
    )
    app.add_exception_handler(HeliumError, _helium_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _any_error)
    return app


_UNVERSIONED = ("/tokenize", "/detokenize", "/rerank", "/score", "/v2/rerank", "/pooling", "/classify")
"""vLLM's routes outside of ``/v1`` that clients call."""


def _mount(app: App, services: Services) -> None:
    llm = LlmRoutes(services)
    app.planned = dict.fromkeys(PLANNED, llm.planned)
    routes = app.router.routes
    app.include_router(model_routes(services))
    app.include_router(admin_routes(services))
    plans = plan_deps(services, llm)
    services.closers.append(plans.close)
    app.include_router(workflow_routes(plans))
    routes.extend(ui_routes())
    for path in ("/v1/{rest:path}", *_UNVERSIONED):
        routes.append(Route(path, Endpoint(llm.direct)))


async def _tick(services: Services) -> None:
    """Once a second: runs that have ended, calls that wait in vain, and the gauges."""
    runs = RunMetrics(services.workflows)
    queued: Counter[str] = Counter()

    def workflows() -> None:
        ends = services.workflows.tick(services.clock())
        runs.tick(ends)
        for end in ends:
            services.tracer.end_run(run_name(end.tenant, end.run))

    def dispatcher() -> None:
        services.dispatcher.tick(services.clock())

    def gauges() -> None:
        nonlocal queued
        queued = _queue_gauge(services, queued)
        _gauges(services)

    while True:
        await asyncio.sleep(_TICK_S)
        for work in (workflows, dispatcher, services.events.tick, gauges, metrics.sweep):
            try:
                work()
            except Exception:
                log.exception("housekeeping failed", work=work.__name__)


def _queue_gauge(services: Services, before: Counter[str]) -> Counter[str]:
    """Calls waiting, by model as metrics name it: of those whose workers are up, of those that wait all the same, and
    of those that were shown `before`."""
    queued = Counter(dict.fromkeys(before, 0))
    for model in services.pool.models():
        queued[metrics.bounded("model", model)] += 0
    for model, queue in services.dispatcher.state.queues.items():
        queued[metrics.bounded("model", model)] += len(queue)
    for name, calls in queued.items():
        metrics.QUEUED.labels(name).set(calls)
    return queued


def _gauges(services: Services) -> None:
    metrics.RUNS_LIVE.set(services.workflows.statistics().runs_live)
    if services.cache is not None:
        services.cache.report()
    state = services.dispatcher.state
    for worker in services.pool:
        known = state.workers.get(worker.id)
        if known is None:
            continue
        held, rates = known.residency.statistics(), known.rates.statistics()
        metrics.WORKER_RUNNING.labels(worker.id).set(len(known.running))
        metrics.WORKER_RESIDENT.labels(worker.id).set(held.referenced + held.free)
        metrics.WORKER_BLOCKS.labels(worker.id).set(known.capacity or 0)
        metrics.WORKER_PINNED.labels(worker.id).set(worker.facts.pinned_blocks or held.pinned)
        metrics.WORKER_PIN_BUDGET.labels(worker.id).set(worker.facts.pin_budget_blocks or 0)
        metrics.WORKER_PREFILL_RATE.labels(worker.id).set(rates.prefill)
        metrics.WORKER_DECODE_RATE.labels(worker.id).set(rates.decode)


async def _close(services: Services) -> None:
    for close in services.closers:
        await close()
    await services.background.close()
    await services.events.close()
    if services.coalescer is not None:
        await services.coalescer.aclose()
    await services.pool.close()
    if services.cache is not None:
        await services.cache.close()
    services.workflows.close()
    services.tracer.close()
    await services.client.close()
    metrics.sweep(ending=True)


# -- errors of the FastAPI routes, in OpenAI's form (the call path has its own)


async def _helium_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HeliumError)
    metrics.ERRORS.labels(error.code or error.type).inc()
    return JSONResponse(error.body(), error.status, headers=error.headers())


async def _any_error(request: Request, error: Exception) -> Response:
    """A bug; what it was goes to the log alone."""
    return await _helium_error(request, HeliumError("internal error"))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem: dict[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"][1:]) or None
    return await _helium_error(request, InvalidRequest(f"{where or 'request'}: {problem['msg']}", param=where))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return await _helium_error(request, NotFound(f"no route {request.method} {request.url.path}"))
    if error.status_code == 401:
        return await _helium_error(request, Unauthorized(str(error.detail)))
    body = {"error": {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, error.status_code, headers=error.headers)
