"""Submitted work: planned in a thread, run in the background, remembered for a while.

The store is bounded in jobs, in jobs per tenant, in operators, in bytes of results and in time. Only finished jobs
are evicted; when none is left to evict, a new one is refused with 429. A tenant sees its own jobs only.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Literal

import structlog

from helium_proxy.errors import Draining, NotFound, QueueFull
from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.execute import CallPort, JobRun
from helium_proxy.planner.graph import OperatorGraph, expand
from helium_proxy.planner.pipeline import PhysicalPlan, Planning, optimize
from helium_proxy.planner.plan import parse_plan
from helium_proxy.planner.rules import Lookup
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.planner.trie import Count, Profile, count_chars

log = structlog.get_logger(__name__)

JobState = Literal["running", "completed", "partial", "failed", "cancelled"]

CacheLookup = Callable[[str, Mapping[str, Any]], Awaitable[str | None] | str | None]
"""(tenant, request body) → the text of the cached answer. Called from a planning thread; where it returns an
awaitable, that is awaited on the event loop."""

_PLANNERS = 2
"""Plans made at a time: planning is pure Python and shares the interpreter with live traffic."""


def _sequence() -> Callable[[], int]:
    return count(1).__next__


@dataclass(frozen=True)
class PlannerDeps:
    """What submitted plans need of the rest of the proxy."""

    port: CallPort
    settings: PlanSettings = field(default_factory=PlanSettings)
    workers: Callable[[], Sequence[PlanWorker]] = tuple
    """A snapshot of the workers to plan for."""
    cache_lookup: CacheLookup | None = None
    count: Count = count_chars
    profile: Callable[[str], Profile] | None = None
    """Tenant → the output lengths that its workflows' earlier runs have shown. Asked in a thread."""
    next_run_seq: Callable[[], int] = field(default_factory=_sequence)
    """The process's counter of runs: a job is one run to the dispatcher."""
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


class Job:
    """One submission: its plan, its run, and the task that drives it."""

    def __init__(self, id_: str, tenant: str, plan: PhysicalPlan, run: JobRun, created_at: float) -> None:
        self.id = id_
        self.tenant = tenant
        self.plan = plan
        self.run = run
        self.created_at = created_at
        # All mutable state.
        self.state: JobState = "running"
        self.finished_at: float | None = None
        self.expires: float | None = None  # on the store's clock, once finished
        self.task: asyncio.Task[None] | None = None
        self.done = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.state} {self.plan!r}>"

    def view(self, *, results: bool = True) -> dict[str, Any]:
        """The job as ``GET /v1/workflows/{id}`` shows it."""
        statistics = self.run.statistics()
        states = [row.state for row in self.run.rows]
        shown: dict[str, Any] = {
            "id": self.id,
            "object": "workflow",
            "workflow": self.plan.graph.workflow,
            "status": self.state,
            "created_at": int(self.created_at),
            "finished_at": None if self.finished_at is None else int(self.finished_at),
            "operators": {
                "submitted": self.plan.submitted,
                "planned": len(self.plan.ids),
                **statistics.operators,
            },
            "inputs": {state: states.count(state) for state in dict.fromkeys(states)} | {"total": len(states)},
            "fates": dict(statistics.fates),
            "usage": {
                "prompt_tokens": statistics.prompt_tokens,
                "completion_tokens": statistics.output_tokens,
                "total_tokens": statistics.prompt_tokens + statistics.output_tokens,
                "prompt_tokens_details": {"cached_tokens": statistics.cached_tokens},
            },
        }
        if results:
            shown["results"] = [self.row(index) for index in range(len(states))]
        return shown

    def row(self, index: int) -> dict[str, Any]:
        """One input's results, as far as they are there."""
        row = self.run.rows[index]
        shown: dict[str, Any] = {"input": index, "status": row.state, "outputs": row.outputs}
        if row.errors:
            shown["errors"] = row.errors
        return shown


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    jobs: int
    running: int
    kept_bytes: int


class JobStore:
    """Every job the process remembers."""

    def __init__(self, deps: PlannerDeps) -> None:
        self.deps = deps
        # All mutable state: jobs, oldest first; the slots for planning; closed or not.
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._planners = asyncio.Semaphore(_PLANNERS)
        self._reserved: dict[str, int] = {}  # tenant → plans being made that will become jobs
        self._closed = False

    def __repr__(self) -> str:
        return f"<JobStore {self.statistics()}>"

    def statistics(self) -> StoreStatistics:
        jobs = self._jobs.values()
        running = sum(job.state == "running" for job in jobs)
        return StoreStatistics(len(jobs), running, sum(job.run.kept_bytes for job in jobs))

    async def plan(self, tenant: str, raw: Any) -> PhysicalPlan:
        """Check and plan a workflow. Raises `InvalidRequest`."""
        settings = self.deps.settings
        return await self._plan(tenant, lambda: expand(parse_plan(raw, settings), settings), self._lookup(tenant))

    async def _plan(self, tenant: str, make: Callable[[], OperatorGraph], lookup: Lookup | None) -> PhysicalPlan:
        deps = self.deps
        profile = deps.profile(tenant) if deps.profile is not None else None
        planning = Planning(deps.settings, deps.workers(), deps.count, profile, lookup)
        async with self._planners:
            return await asyncio.to_thread(lambda: optimize(make(), planning))

    def _lookup(self, tenant: str) -> Lookup | None:
        lookup = self.deps.cache_lookup
        if lookup is None:
            return None
        loop = asyncio.get_running_loop()

        async def awaited(found: Awaitable[str | None]) -> str | None:
            return await found

        def look(body: Mapping[str, Any]) -> str | None:
            try:
                found = lookup(tenant, body)
                if inspect.isawaitable(found):
                    return asyncio.run_coroutine_threadsafe(awaited(found), loop).result()
            except Exception:
                return None  # a cache in trouble is a cache that misses
            return found

        return look

    async def submit(self, tenant: str, raw: Any) -> Job:
        """Plan a workflow and start it. Raises `InvalidRequest`, `QueueFull` or `Draining`."""
        settings = self.deps.settings
        return await self._submit(
            tenant, lambda: expand(parse_plan(raw, settings), settings), "wf", keep_bodies=False
        )

    async def submit_graph(self, tenant: str, make: Callable[[], OperatorGraph], prefix: str) -> Job:
        """The same for operators made by `make` (in a thread), whole answers kept."""
        return await self._submit(tenant, make, prefix, keep_bodies=True)

    async def _submit(self, tenant: str, make: Callable[[], OperatorGraph], prefix: str, *, keep_bodies: bool) -> Job:
        self._admit(tenant)
        self._reserved[tenant] = self._reserved.get(tenant, 0) + 1
        try:
            # A CacheFetch knows the text only: where whole answers are wanted, the call itself meets the cache.
            plan = await self._plan(tenant, make, None if keep_bodies else self._lookup(tenant))
        finally:
            self._reserved[tenant] -= 1
            if not self._reserved[tenant]:
                del self._reserved[tenant]
        if self._closed:
            raise Draining("the proxy is shutting down", retry_after=5)
        live = sum(len(job.run.operators) for job in self._jobs.values() if job.state == "running")
        if live and live + len(plan.graph.operators) > self.deps.settings.max_live_operators:
            raise QueueFull(
                f"{self.deps.settings.max_live_operators:,} unfinished operators are the most", retry_after=10
            )
        deps = self.deps
        id_ = f"{prefix}_{secrets.token_hex(12)}"
        run = JobRun(
            plan,
            deps.port,
            deps.settings,
            job=id_,
            tenant=tenant,
            run_seq=deps.next_run_seq(),
            clock=deps.clock,
            keep_bodies=keep_bodies,
        )
        job = Job(id_, tenant, plan, run, deps.wall())
        self._jobs[id_] = job
        job.task = asyncio.create_task(run.run())
        job.task.add_done_callback(partial(self._finish, job))
        return job

    def _admit(self, tenant: str) -> None:
        """Make room for one more job, or raise."""
        if self._closed:
            raise Draining("the proxy is shutting down", retry_after=5)
        self.evict()
        settings = self.deps.settings
        mine = sum(job.tenant == tenant and job.state == "running" for job in self._jobs.values())
        if mine + self._reserved.get(tenant, 0) >= settings.max_jobs_per_tenant:
            raise QueueFull(f"{settings.max_jobs_per_tenant} unfinished jobs are the most", retry_after=10)
        while len(self._jobs) + sum(self._reserved.values()) >= settings.max_jobs:
            oldest = next((id_ for id_, job in self._jobs.items() if job.state != "running"), None)
            if oldest is None:
                raise QueueFull(f"{settings.max_jobs} unfinished jobs are the most", retry_after=10)
            del self._jobs[oldest]

    def evict(self) -> None:
        """Forget finished jobs that have expired, then the oldest ones while results take too much memory."""
        now, settings = self.deps.clock(), self.deps.settings
        for id_ in [id_ for id_, job in self._jobs.items() if job.expires is not None and job.expires <= now]:
            del self._jobs[id_]
        finished = [job for job in self._jobs.values() if job.state != "running"]
        kept = sum(job.run.kept_bytes for job in finished)
        for job in finished[:-1]:  # the newest stays, whatever its size: somebody is about to read it
            if kept <= settings.max_kept_bytes:
                break
            kept -= job.run.kept_bytes
            del self._jobs[job.id]

    def _finish(self, job: Job, task: asyncio.Task[None]) -> None:
        broken = not task.cancelled() and task.exception() is not None
        if broken:
            log.error("plan.job_failed", job=job.id, exc_info=task.exception())
        job.run.close()
        states = {row.state for row in job.run.rows}
        if broken:
            job.state = "failed"
        elif "cancelled" in states:
            job.state = "cancelled"
        else:
            job.state = "completed" if states == {"completed"} else "partial" if "completed" in states else "failed"
        job.finished_at = self.deps.wall()
        job.expires = self.deps.clock() + self.deps.settings.job_ttl_s
        job.run.announce(job.state)
        job.done.set()

    def get(self, tenant: str, id_: str) -> Job:
        """Raises `NotFound`, also for another tenant's job."""
        self.evict()
        job = self._jobs.get(id_)
        if job is None or job.tenant != tenant:
            raise NotFound(f"no workflow {id_[:64]!r}")
        return job

    def mine(self, tenant: str) -> list[Job]:
        """The tenant's jobs, newest first."""
        self.evict()
        return [job for job in reversed(self._jobs.values()) if job.tenant == tenant]

    async def cancel(self, job: Job) -> None:
        """Stop a job and wait until its calls have ended; a finished one stays as it is."""
        if job.task is not None and not job.task.cancelling():  # a second time would cut the wait for its calls
            job.task.cancel()
        await job.done.wait()

    async def close(self) -> None:
        """Cancel everything that runs and refuse what comes."""
        self._closed = True
        for job in list(self._jobs.values()):
            if job.task is not None and not job.task.cancelling():
                job.task.cancel()
        for job in list(self._jobs.values()):
            await job.done.wait()
