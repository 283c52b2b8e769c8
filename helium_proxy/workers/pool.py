"""The set of workers, and the tasks that watch them.

One task a worker: it asks `/health`, then learns models, block size, capacity and load. Everybody else reads
`Worker` objects and is told of changes through `on_change`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import orjson
import structlog

from helium_proxy import metrics
from helium_proxy.errors import InvalidRequest, NotFound
from helium_proxy.workers.settings import WorkerSpec, WorkersSettings
from helium_proxy.workers.upstream import SendFailed, UpstreamClient
from helium_proxy.workers.worker import Facts, Worker, WorkerState, read_metrics, read_models, worker_id

log = structlog.get_logger(__name__)

_DRAIN_POLL_S = 0.05


class Pool:
    """Workers by id. `on_change(worker)` is called after a state, an epoch or its facts changed; `on_gone(worker)`
    when one has been removed."""

    def __init__(
        self,
        settings: WorkersSettings,
        client: UpstreamClient,
        *,
        on_change: Callable[[Worker], None],
        on_gone: Callable[[Worker], None],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._client = client
        self._on_change = on_change
        self._on_gone = on_gone
        self._clock = clock
        # -- state
        self._workers: dict[str, Worker] = {}  # by id, in the order they were added
        self._tasks: dict[str, asyncio.Task[None]] = {}  # the watcher of each
        self._prodded: dict[str, asyncio.Event] = {}  # set to have a worker checked at once
        self._weights: dict[str, str] = {}  # see `weights`; emptied when any worker's models change

    def __repr__(self) -> str:
        return f"<Pool {[repr(w) for w in self._workers.values()]}>"

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker: str) -> Worker | None:
        return self._workers.get(worker)

    def all(self) -> list[Worker]:
        return list(self._workers.values())

    def weights(self, model: str) -> str:
        """The model's name and what its workers load under it: another one once that is something else."""
        known = self._weights.get(model)
        if known is None:
            cards = [m for w in self._workers.values() for m in w.facts.models if m.id == model]
            loaded = sorted({f"{m.root}\0{m.raw.get('parent')}" for m in cards})
            known = "\0".join([model, *loaded])
            if cards:
                self._weights[model] = known
        return known

    def models(self) -> set[str]:
        """Models of the workers that are up (or, while none has come up yet, of none)."""
        return {m.id for w in self._workers.values() if w.state == "up" for m in w.facts.models}

    def add(self, spec: WorkerSpec) -> Worker:
        """Adds a worker and starts to watch it; adding one that is there takes over its new spec (a key, say), and
        one that was draining serves again. Raises InvalidRequest beyond the limit."""
        known = self._workers.get(worker_id(spec.url))
        if known is not None:
            known.spec = spec
            if known.state == "draining":
                self._set_state(known, "starting")
            return known
        self.check([*(w.spec for w in self._workers.values()), spec])
        return self._enter(spec)

    def check(self, specs: Sequence[WorkerSpec]) -> None:
        """Raises InvalidRequest where these would be too many."""
        if len({worker_id(spec.url) for spec in specs}) > self._settings.max_workers:
            raise InvalidRequest(f"no more than {self._settings.max_workers} workers", param="url")

    def _enter(self, spec: WorkerSpec) -> Worker:
        worker = Worker(spec, self._settings)
        self._workers[worker.id] = worker
        self._prodded[worker.id] = asyncio.Event()
        self._show(worker, Facts())
        self._tasks[worker.id] = asyncio.create_task(self._watch(worker), name=f"watch {worker.id}")
        log.info("worker added", worker=worker.id)
        return worker

    async def remove(self, worker: str, *, drain_s: float = 30.0) -> None:
        """Takes no more calls to it, waits up to `drain_s` for those it has, and forgets it. Raises NotFound."""
        found = self._workers.get(worker)
        if found is None:
            raise NotFound(f"no worker {worker!r}", param="worker")
        self._set_state(found, "draining")
        deadline = self._clock() + drain_s
        while found.inflight and self._clock() < deadline:  # noqa: ASYNC110 -- nothing signals an idle worker
            await asyncio.sleep(_DRAIN_POLL_S)
        if found.state != "draining" or self._workers.get(worker) is not found:
            return  # added again, or removed by someone else, meanwhile
        del self._workers[worker]
        self._weights.clear()
        self._prodded.pop(worker, None)
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()
        self._on_gone(found)
        metrics.forget_worker(worker)
        log.info("worker removed", worker=worker)

    async def sync(self, specs: Iterable[WorkerSpec]) -> None:
        """Makes the set equal to `specs`, which are not too many (`check`): adds what is missing, drains and removes
        the rest."""
        wanted = {worker_id(s.url): s for s in specs}
        gone = [w for w in self._workers if w not in wanted]
        for name, spec in wanted.items():
            if name in self._workers:
                self.add(spec)
            else:
                self._enter(spec)  # however many of the others still drain
        await asyncio.gather(*(self.remove(w) for w in gone), return_exceptions=True)

    def note(self, worker: Worker, failure: SendFailed | None) -> None:
        """A passive signal: how a send to `worker` ended. A refused or lost connection has it checked at once."""
        if self._workers.get(worker.id) is not worker:
            return  # removed meanwhile
        now = self._clock()
        was = worker.breaker.state(now)
        if worker.breaker.record(failure is None, now):
            metrics.BREAKER_OPENS.labels(worker.id).inc()
            log.warning("breaker opened", worker=worker.id, error=str(failure))
        if worker.breaker.state(now) != was:
            self._on_change(worker)
        if failure is not None and failure.kind in ("refused", "lost"):
            self.doubt(worker)

    def doubt(self, worker: Worker) -> None:
        """Has `worker` checked at once, its models too."""
        event = self._prodded.get(worker.id)
        if event is not None:
            event.set()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    # -- watching

    async def _watch(self, worker: Worker) -> None:
        settings, prodded = self._settings, self._prodded[worker.id]
        models_due = 0.0
        health_due = 0.0
        while True:
            now = self._clock()
            try:
                if now >= health_due or prodded.is_set():
                    urgent = prodded.is_set()
                    prodded.clear()
                    models_due = await self._check(worker, models_due, urgent=urgent)
                    doubtful = worker.failed_checks > 0
                    health_due = self._clock() + (settings.retry_down_s if doubtful else settings.health_interval_s)
                if worker.state in ("up", "draining") and not await self._learn_metrics(worker):
                    models_due = health_due = 0.0
                if worker.breaker.state(self._clock()) == "half-open":
                    self._on_change(worker)  # time alone made it available: calls may be waiting for that
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("watching failed", worker=worker.id)
            well = worker.state == "up" and not worker.failed_checks
            pause = settings.metrics_interval_s if well else settings.retry_down_s
            if worker.state != "up":
                health_due = 0.0
            try:
                await asyncio.wait_for(prodded.wait(), pause * random.uniform(0.8, 1.2))
            except TimeoutError:
                pass

    async def _check(self, worker: Worker, models_due: float, *, urgent: bool) -> float:
        """One health check; returns when the models are to be read next."""
        settings = self._settings
        try:
            status, _ = await self._get(worker, "/health")
            if status == 404:  # not vLLM, but something that speaks its protocol
                status = 200
            if status != 200:
                raise SendFailed("lost", f"/health answered {status}")
            now = self._clock()
            if now >= models_due or urgent or worker.state != "up":
                status, body = await self._get(worker, "/v1/models")
                if status != 200:
                    raise SendFailed("lost", f"/v1/models answered {status}")
                before, worker.facts = worker.facts, read_models(worker.facts, orjson.loads(body))
                if worker.facts.models != before.models:
                    self._weights.clear()
                models_due = now + settings.models_interval_s
                if worker.state == "up" and _differs(before, worker.facts):
                    self._show(worker, before)
                    self._on_change(worker)
        except (SendFailed, ValueError) as error:
            worker.failed_checks += 1
            worker.last_error = str(error)
            refused = isinstance(error, SendFailed) and error.kind == "refused"
            # A refused connection on a check that a failed call asked for leaves nothing to wait for.
            if worker.state == "up" and (worker.failed_checks >= settings.unhealthy_after or (urgent and refused)):
                self._set_state(worker, "down")
            elif worker.state == "starting" and worker.failed_checks == settings.unhealthy_after:
                log.warning("worker has not come up yet", worker=worker.id, error=worker.last_error)
            return 0.0
        worker.failed_checks = 0
        worker.last_error = None
        if worker.state in ("starting", "down"):
            await self._learn_metrics(worker)
            worker.epoch += 1
            worker.breaker.reset()
            self._set_state(worker, "up")
        return models_due

    async def _learn_metrics(self, worker: Worker) -> bool:
        """False when the worker has restarted, or cannot be reached, as while it does: all is to be asked anew."""
        ours, sent = worker.inflight + worker.ahead, worker.sent
        try:
            status, text = await self._get(worker, "/metrics")
        except SendFailed as error:
            return error.kind not in ("refused", "lost")
        if status != 200:
            return True
        before = worker.facts
        worker.facts = after = read_metrics(before, text, worker.spec)
        # Calls that wait while none runs are merely on their way in.
        worker.foreign_waiting = max(0, after.waiting - ours - (worker.sent - sent)) if after.running else 0
        restarted = after.prompt_tokens < before.prompt_tokens
        worker.epoch += restarted
        if restarted or _differs(before, after):
            self._on_change(worker)
        return not restarted

    async def _get(self, worker: Worker, path: str) -> tuple[int, bytes]:
        answer = await self._client.send(
            worker, "GET", path, headers={}, body=None, timeout_s=self._settings.health_timeout_s
        )
        return answer.status, await answer.read()

    def _set_state(self, worker: Worker, state: WorkerState) -> None:
        if worker.state == state:
            return
        level = logging.WARNING if state == "down" else logging.INFO
        log.log(level, "worker state", worker=worker.id, state=state, was=worker.state, error=worker.last_error)
        worker.state = state
        self._show(worker, Facts())
        self._on_change(worker)

    def _show(self, worker: Worker, before: Facts) -> None:
        """Its state as a metric of each of its models, or of none while none is known; `before`: models it had."""
        gone = {m.id for m in before.models} - {m.id for m in worker.facts.models}
        unnamed = [""]
        if metrics.shared_files() is not None:
            gone, unnamed = set(), []  # what could not be dropped would be down for ever
        for model in [*gone, *(unnamed if worker.facts.models else [])]:
            with contextlib.suppress(KeyError):
                metrics.WORKER_UP.remove(worker.id, metrics.bounded("model", model) if model else "")
        for name in [m.id for m in worker.facts.models] or unnamed:
            label = metrics.bounded("model", name) if name else ""
            metrics.WORKER_UP.labels(worker.id, label).set(1 if worker.state == "up" else 0)


def _differs(before: Facts, after: Facts) -> bool:
    """Whether anything but the load changed."""
    return replace(before, running=0, waiting=0, kv_usage=0, prompt_tokens=0, preemptions=0) != replace(
        after, running=0, waiting=0, kv_usage=0, prompt_tokens=0, preemptions=0
    )
