"""The loop around `decide`: callers wait for an assignment, workers' changes and finished calls set it going.

Arrivals of one turn of the event loop (a fan-out's siblings) are decided together. No I/O happens here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from helium_proxy import metrics
from helium_proxy.dispatch.policy import decide
from helium_proxy.dispatch.settings import DispatchSettings
from helium_proxy.dispatch.state import Assignment, DispatchState, QueuedCall, WorkerState
from helium_proxy.errors import ModelNotFound, NoWorker, QueueFull
from helium_proxy.residency.index import Chain
from helium_proxy.workers.pool import Pool
from helium_proxy.workers.worker import Worker

log = structlog.get_logger(__name__)

Stranded = tuple[str, str | None]
"""A model with calls waiting and no worker up; or one that has some, and another that calls must go to."""


@dataclass(frozen=True, slots=True)
class DispatchStatistics:
    """Calls waiting and running, decisions made, and the longest decision in seconds."""

    queued: int
    running: int
    decisions: int
    slowest_s: float


class Dispatcher:
    """Hands out assignments. Every `acquire` that returned must be followed by one `release`.

    `at_once`: nothing is decided; a call goes to the least loaded worker as it comes."""

    def __init__(
        self, settings: DispatchSettings, pool: Pool, *, clock: Callable[[], float], at_once: bool = False
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._at_once = at_once
        # -- state
        self.state = DispatchState(settings)
        self._waiting: dict[str, asyncio.Future[Assignment]] = {}  # call → its caller
        self._outside = 0  # calls that wait for a worker to come up, and are not queued yet
        self._pump_due = False
        self._wake: asyncio.TimerHandle | None = None  # when something that is waited for is given up
        self._stranded: dict[Stranded, float] = {}  # since when
        self._came_up = asyncio.Event()  # set, and replaced, whenever a worker changed
        self._decisions = 0
        self._slowest = 0.0

    def __repr__(self) -> str:
        return f"<Dispatcher {self.state!r}>"

    def statistics(self) -> DispatchStatistics:
        running = sum(len(w.running) for w in self.state.workers.values())
        return DispatchStatistics(self.state.queued, running, self._decisions, self._slowest)

    async def acquire(self, call: QueuedCall) -> Assignment:
        """Waits until `call` may start. Raises QueueFull, ModelNotFound, or NoWorker when none of its model, or the
        one that it must go to, comes up in time. Cancelling the wait takes the call out of the queue."""
        self.check_room()
        self._outside += 1
        try:
            await self._wait_for_any(call)
            if self._at_once:
                while (chosen := self._least_loaded(call)) is None:
                    await self._wait_for_any(call)
                return self._start(call, chosen)
        finally:
            self._outside -= 1
        future: asyncio.Future[Assignment] = asyncio.get_running_loop().create_future()
        self._waiting[call.id] = future
        self.state.enqueue(call, self._clock())
        self._pump_soon()
        try:
            return await future
        except asyncio.CancelledError:
            if self.state.withdraw(call):
                self._pump_soon()  # others may have waited for its run
            elif future.done() and not future.cancelled():
                self.release(future.result(), ok=False, reached=False)
            raise
        finally:
            self._waiting.pop(call.id, None)

    def check_room(self) -> None:
        """Raises QueueFull when no more calls may wait."""
        waiting = self.state.queued + self._outside
        if waiting >= self.state.settings.max_queue:
            raise QueueFull(f"{waiting} calls are waiting already", retry_after=self._retry_after())

    def release(
        self,
        assignment: Assignment,
        *,
        ok: bool,
        reached: bool = True,
        computed_tokens: int | None = None,
        output_tokens: int | None = None,
        extension: Chain = (),
    ) -> None:
        """The call is over. `reached`: the engine may have computed its prompt. Counts come from the worker's
        `usage`, None where it gave none; `extension` is the part of the chain that its output added."""
        now, call = self._clock(), assignment.call
        self._pump_soon()
        if not self.state.release(assignment.worker, call.id, now, extension if ok else (), ok=ok):
            return
        worker = self.state.workers[assignment.worker]
        if not ok:
            worker.rates.abandoned(call.id, now)
            if not reached:
                worker.residency.correct(call.chain, assignment.cached_tokens // call.block_size)
            return
        computed = computed_tokens if computed_tokens is not None else call.prompt_tokens - assignment.cached_tokens
        output = call.output_tokens if output_tokens is None else output_tokens
        self.state.measure(assignment, max(0, computed), output, now)

    # -- workers

    def worker_changed(self, worker: Worker) -> None:
        """A worker came up, went down, restarted, or told more of itself."""
        facts = worker.facts
        known = self.state.workers.get(worker.id)
        if known is None:
            if worker.state != "up":
                return
            known = self.state.join(worker.id, frozenset(), facts.block_size, facts.num_blocks, epoch=worker.epoch)
        known.models = frozenset(m.id for m in facts.models)
        known.open = worker.available(self._clock())
        if facts.num_blocks and facts.num_blocks != known.capacity:
            known.capacity = facts.num_blocks
            known.residency.resize(facts.num_blocks)
            known.version += 1
        known.block_size = facts.block_size or known.block_size
        if worker.epoch != known.epoch:
            known.epoch = worker.epoch
            known.clear()
            self.state.lost(worker.id)
        if facts.alone_s is not None:
            known.rates.calibrated(*facts.alone_s)
        self._came_up.set()
        self._came_up = asyncio.Event()
        self._pump_soon()

    def worker_gone(self, worker: Worker) -> None:
        self.state.leave(worker.id)
        self._pump_soon()

    def tick(self, now: float) -> None:
        """Once a second: calls whose model, or whose own worker, has been away for too long get their error instead
        of waiting on."""
        stranded: dict[Stranded, list[QueuedCall]] = {}
        for model, queue in self.state.queues.items():
            workers = self.state.serving(model)
            for worker in workers:
                self._available(worker.id)
            up = any(worker.open for worker in workers)
            for call in queue.unplaced.values() if up else queue:
                if not up or self.state.awaits_its_own(call):
                    stranded.setdefault((model, call.prefer if up else None), []).append(call)
        self._stranded = {who: self._stranded.get(who, now) for who in stranded}
        for (model, own), calls in stranded.items():
            if now - self._stranded[model, own] > self.state.settings.no_worker_wait_s:
                for call in calls:
                    future = self._waiting.get(call.id)
                    self.state.withdraw(call)
                    if future is not None and not future.done():
                        future.set_exception(self._none_up(model) if own is None else _own_away())
        self._pump_soon()  # a breaker closes by time, and nobody else may be there to notice

    async def _wait_for_any(self, call: QueuedCall) -> None:
        """Returns once some worker that may have `call` is open. Raises as the two waits do."""
        await self.wait_for_model(call.model)
        if call.prefer is not None:
            await self._wait_for_worker(call.prefer)

    async def wait_for_model(self, model: str) -> None:
        """Returns once some worker of `model` is open. Raises ModelNotFound when workers are up and none has it,
        NoWorker when none came up in time."""
        if any(w.open for w in self.state.serving(model)):
            return
        deadline = self._clock() + self.state.settings.no_worker_wait_s
        while not any(self._available(w.id) for w in self.state.serving(model)):
            workers = self._pool.all()
            if workers and all(w.facts.models for w in workers) and not any(w.serves(model) for w in workers):
                raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
            remaining = deadline - self._clock()
            if remaining <= 0 or not workers:
                if any(w.state == "up" for w in workers) and not any(w.serves(model) for w in workers):
                    raise ModelNotFound(f"The model `{model}` does not exist.", param="model")
                raise self._none_up(model)
            await self._change(remaining)

    def _none_up(self, model: str) -> NoWorker:
        """Why nobody answers, of a worker that would."""
        troubled = [w for w in self._pool.all() if w.last_error and (not w.facts.models or w.serves(model))]
        reason = f" ({troubled[0].id}: {troubled[0].last_error})" if troubled else ""
        return NoWorker(f"no worker of model `{model}` is up{reason}", retry_after=5)

    async def _wait_for_worker(self, worker: str) -> None:
        """Returns once `worker` is open, or has been removed for good. Raises NoWorker when it does not come up in
        time."""
        deadline = self._clock() + self.state.settings.no_worker_wait_s
        while self._pool.get(worker) is not None and not self._available(worker):
            remaining = deadline - self._clock()
            if remaining <= 0:
                raise _own_away()
            await self._change(remaining)

    async def _change(self, remaining_s: float) -> None:
        """Returns when some worker has changed, or so soon that a breaker that closes by time is seen."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._came_up.wait(), min(remaining_s, 0.25))

    def _available(self, worker: str) -> bool:
        """Whether the pool has `worker` available now; brings `open` up to date (a breaker closes by time)."""
        state = self.state.workers.get(worker)
        found = self._pool.get(worker)
        if state is None or found is None:
            return False
        now = self._clock()
        state.open = found.available(now)
        state.allowance = 1 if found.breaker.state(now) == "half-open" else None
        return state.open

    # -- deciding

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if not self.state.queues:
            return
        for worker in self.state.workers:
            self._available(worker)
        began = time.perf_counter()
        try:
            assignments = decide(self.state, self._clock())
        except Exception:
            log.exception("decide failed; calls go to the least loaded worker")
            metrics.FAIL_OPEN.labels("dispatch").inc()
            assignments = self._decide_blindly()
        took = time.perf_counter() - began
        self._decisions += 1
        self._slowest = max(self._slowest, took)
        metrics.DECIDE_SECONDS.observe(took)
        for assignment in assignments:
            metrics.PLACEMENTS.labels(assignment.worker, assignment.reason).inc()
            future = self._waiting.get(assignment.call.id)
            if (chosen := self._pool.get(assignment.worker)) is not None:
                chosen.breaker.sent(self._clock())  # lest the next decision send another as a probe
            if future is None or future.done():
                self.release(assignment, ok=False, reached=False)
            else:
                future.set_result(assignment)
        if self.state.unfinished:
            self._pump_soon()
            return
        end = self.state.next_end()
        if end is not None and self.state.queues:  # somebody may go then who waits for that
            delay = max(0.0, end - self._clock())
            self._wake = asyncio.get_running_loop().call_later(delay, self._pump_soon)

    def _decide_blindly(self) -> list[Assignment]:
        """What `decide` would do if nothing were known: a bug in the policy must not cost an answer. Everybody who
        waits gets a worker, those too whom the failed decision had already taken out of the queue."""
        queued = {call.id: call for queue in self.state.queues.values() for call in queue}
        assignments = [
            running
            for worker in self.state.workers.values()
            for running in worker.running.values()
            if running.call.id in self._waiting and not self._waiting[running.call.id].done()
        ]
        for call in queued.values():
            worker = self._least_loaded(call)
            if worker is not None and self.state.take(call):
                assignments.append(self._start(call, worker))
        return assignments

    def _least_loaded(self, call: QueuedCall) -> WorkerState | None:
        """Of the workers that may have `call`, the one that runs the fewest calls; None while none is available."""
        workers = self.state.serving(call.model)
        workers = [w for w in workers if w.id == call.prefer] or workers  # no other could answer it
        workers = [w for w in workers if self._available(w.id)]
        if not workers:
            return None
        allowed = [w for w in workers if w.id not in call.exclude] or workers
        turn = self.state.next_turn() % len(allowed)  # among equals
        return min(allowed[turn:] + allowed[:turn], key=lambda w: (w.allowance == 0, len(w.running)))

    def _start(self, call: QueuedCall, worker: WorkerState) -> Assignment:
        """`call` runs on `worker`, of whose cache and time nothing is foretold."""
        blind = replace(call, chain=(), hits={})
        assignment = Assignment(blind, worker.id, 0, "least-loaded", 0, self._clock(), 0.0, 0.0)
        worker.running[call.id] = assignment
        return assignment

    def _retry_after(self) -> float:
        """Seconds until the queue has drained, about."""
        workers = max(1, len(self.state.workers))
        mean = 0.5
        running = [a.predicted_s for w in self.state.workers.values() for a in w.running.values()]
        if running:
            mean = sum(running) / len(running)
        return min(60.0, max(1.0, self.state.queued * mean / (workers * max(1, len(running) / workers))))


def _own_away() -> NoWorker:
    return NoWorker("the worker that holds what this call continues is not up", retry_after=5)
