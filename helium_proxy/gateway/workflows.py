"""``/v1/workflows``: whole workflows over a batch of inputs, planned before they run.

POST   /v1/workflows                 plan and start; 202 with the job
GET    /v1/workflows                 the tenant's jobs, newest first, without results
GET    /v1/workflows/{id}            the job and its results so far (?wait_s= waits for the end)
GET    /v1/workflows/{id}/events     progress and results as server-sent events (Last-Event-ID resumes)
GET    /v1/workflows/{id}/explain    the plan beside what happened
DELETE /v1/workflows/{id}            cancel; answers when every call has ended
POST   /v1/workflows/explain         the plan, not run (?analyze=true: run, then the plan beside what happened)

Where a plan is shown beside what happened, the header X-Helium-Failed-Operators counts the operators that failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from helium_proxy.errors import DeadlineExceeded, Draining, InvalidRequest
from helium_proxy.gateway.batches import batch_routes, body_of, json_response, parse_json
from helium_proxy.gateway.http import Watches
from helium_proxy.planner.batch import Batches
from helium_proxy.planner.explain import Actual, explain_json, explain_text
from helium_proxy.planner.jobs import Job, JobStore, PlannerDeps
from helium_proxy.planner.pipeline import PhysicalPlan


@dataclass(frozen=True, kw_only=True)
class PlanDeps(PlannerDeps):
    """What the routes need; make one for each application and `close` it at shutdown, inside its event loop."""

    tenant_of: Callable[[Request], str]
    """The caller's tenant. Raises `Unauthorized`."""
    draining: Callable[[], bool] = bool
    """Whether no new work is taken."""
    watches: Watches = field(default_factory=Watches)

    def check_open(self) -> None:
        """Raises `Draining` once the proxy is to end."""
        if self.draining():
            raise Draining("the proxy is shutting down", retry_after=1)

    @cached_property
    def jobs(self) -> JobStore:
        return JobStore(self)

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.jobs)

    async def close(self) -> None:
        """Cancel every job and refuse new ones."""
        await self.batches.close()
        await self.jobs.close()


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false").lower()
    if value not in ("", "0", "1", "true", "false"):
        raise InvalidRequest(f"{name!r} is true or false", param=name)
    return value not in ("0", "false")


def _seconds(request: Request, name: str, most: float) -> float:
    value = request.query_params.get(name)
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        raise InvalidRequest(f"{name!r} is a number of seconds", param=name) from None
    if not seconds >= 0:
        raise InvalidRequest(f"{name!r} must not be negative", param=name)
    return min(seconds, most)


async def _explained(request: Request, plan: PhysicalPlan, actuals: dict[int, Actual] | None) -> Response:
    form = request.query_params.get("format")
    if form not in (None, "text", "json"):
        raise InvalidRequest("'format' is text or json", param="format")
    wants_text = form == "text" or (form is None and "text/plain" in request.headers.get("accept", ""))
    headers: dict[str, str] = {}
    if actuals is not None:
        headers["x-helium-failed-operators"] = str(sum(actual.status == "failed" for actual in actuals.values()))
    if wants_text:
        return PlainTextResponse(await asyncio.to_thread(explain_text, plan, actuals), headers=headers)
    return json_response(await asyncio.to_thread(explain_json, plan, actuals), headers=headers)


def _message(name: str, data: Any, seq: int) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, name.encode(), orjson.dumps(data))


async def event_stream(job: Job, after: int, heartbeat_s: float) -> AsyncIterator[bytes]:
    """Server-sent events of `job` from the one after `after` (0: from the beginning) to its end. A reader who has
    missed events that are no longer kept gets the job's present state, as event `snapshot`, in their place. An
    `input` event carries that input's results."""
    run = job.run
    while True:
        oldest = run.events[0][0] if run.events else run.event_seq + 1
        if after + 1 < oldest:
            after = run.event_seq
            yield _message("snapshot", job.view(), after)
        fresh = run.event_seq - after
        batch = [run.events[i] for i in range(len(run.events) - fresh, len(run.events))] if fresh > 0 else []
        for seq, name, data in batch:
            after = seq
            yield _message(name, job.row(data["input"]) if name == "input" else data, seq)
        if run.event_seq > after:
            continue
        if job.done.is_set():
            return
        try:
            async with asyncio.timeout(heartbeat_s):
                await run.changed()
        except TimeoutError:
            yield b": still running\n\n"


def workflow_routes(deps: PlanDeps) -> APIRouter:
    """The routes of submitted plans and of the Batch API. Errors are raised as `HeliumError`."""
    router = APIRouter()
    settings = deps.settings

    async def submitted(request: Request) -> tuple[str, Any]:
        tenant = deps.tenant_of(request)
        deps.check_open()
        return tenant, parse_json(await body_of(request, settings.max_body_bytes))

    def job_of(request: Request, id_: str) -> Job:
        return deps.jobs.get(deps.tenant_of(request), id_)

    @router.post("/v1/workflows")
    async def create(request: Request) -> Response:
        job = await deps.jobs.submit(*await submitted(request))
        return json_response(job.view(results=False), 202, {"location": f"/v1/workflows/{job.id}"})

    @router.get("/v1/workflows")
    async def jobs(request: Request) -> Response:
        found = deps.jobs.mine(deps.tenant_of(request))
        return json_response({"object": "list", "data": [job.view(results=False) for job in found]})

    @router.post("/v1/workflows/explain")
    async def explain(request: Request) -> Response:
        analyze = _flag(request, "analyze")
        tenant, raw = await submitted(request)
        if not analyze:
            return await _explained(request, await deps.jobs.plan(tenant, raw), None)
        job = await deps.jobs.submit(tenant, raw)
        try:
            async with asyncio.timeout(settings.analyze_timeout_s):
                with deps.watches.watching(request.scope, request.receive):
                    await job.done.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"workflow {job.id} did not end within {settings.analyze_timeout_s:g} s and was cancelled"
            ) from None
        finally:
            if not job.done.is_set():
                await asyncio.shield(deps.jobs.cancel(job))
        return await _explained(request, job.plan, job.run.actuals())

    @router.get("/v1/workflows/{id_}")
    async def status(request: Request, id_: str) -> Response:
        job = job_of(request, id_)
        try:
            async with asyncio.timeout(_seconds(request, "wait_s", settings.max_wait_s)):
                await job.done.wait()
        except TimeoutError:
            pass
        return json_response(job.view())

    @router.get("/v1/workflows/{id_}/explain")
    async def explain_job(request: Request, id_: str) -> Response:
        job = job_of(request, id_)
        return await _explained(request, job.plan, job.run.actuals())

    @router.get("/v1/workflows/{id_}/events")
    async def events(request: Request, id_: str) -> Response:
        job = job_of(request, id_)
        last = request.headers.get("last-event-id", "0")
        if not (last.isascii() and last.isdigit()):
            raise InvalidRequest("Last-Event-ID is the id of an event of this stream", param="last-event-id")
        stream = event_stream(job, min(int(last[:18]), job.run.event_seq), settings.heartbeat_s)
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @router.delete("/v1/workflows/{id_}")
    async def cancel(request: Request, id_: str) -> Response:
        job = job_of(request, id_)
        await deps.jobs.cancel(job)
        return json_response(job.view())

    router.include_router(batch_routes(deps.batches, deps.tenant_of, deps.check_open))
    return router


__all__ = ["PlanDeps", "event_stream", "workflow_routes"]
