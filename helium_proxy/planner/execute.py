"""Run a scheduled plan: start every operator as soon as its inputs are there, in plan order among those ready.

An operator that fails takes with it only what depends on it; the other rows, and the other outputs of its row, go
on. Retrying is the dispatcher's business, with one exception: a call that a full queue refuses (429) goes back and
waits until one of the job's own has ended, so that a job larger than the queue feeds it as fast as it drains.
Cancelling `JobRun.run` cancels the calls in flight and waits for them to end.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog

from helium_proxy.errors import HeliumError
from helium_proxy.planner.explain import Actual
from helium_proxy.planner.graph import Operator, request_body
from helium_proxy.planner.hints import PlanHints
from helium_proxy.planner.pipeline import PhysicalPlan
from helium_proxy.planner.port import CallPort, CallResult, reply_text
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.types import Fate

log = structlog.get_logger(__name__)

_OPERATOR_BYTES = 3_000
"""What the plan and the run of one operator take in memory, about, its texts excluded."""

OperatorState = Literal["waiting", "running", "done", "failed", "skipped", "cancelled"]
RowState = Literal["running", "completed", "failed", "cancelled"]


_REGAINED = 2
"""Calls that may be started for each that has ended, after the queue refused one."""
_MOST_PARENTS, _LONGEST_NAME = 64, 128
"""What the tags of a call may have (`workflow.max_parents`, `workflow.max_tag_chars` by default)."""


@dataclass(slots=True)
class OperatorRun:
    """One operator's progress. Times in seconds on the run's clock."""

    state: OperatorState = "waiting"
    result: CallResult | None = None
    error: Mapping[str, Any] | None = None
    """OpenAI's error object: why it failed, or why what it depends on did."""
    status: int = 0
    started: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class Row:
    """One input row's results."""

    unresolved: int
    state: RowState = "running"
    outputs: dict[str, str] = field(default_factory=dict)
    errors: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    bodies: dict[str, CallResult] = field(default_factory=dict)
    """Whole answers, where the run was told to keep them."""


@dataclass(frozen=True, slots=True)
class RunStatistics:
    """Operators by state; calls by fate; tokens of the calls made."""

    operators: Mapping[OperatorState, int]
    fates: Mapping[Fate, int]
    in_flight: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class JobRun:
    """The execution of one plan."""

    def __init__(
        self,
        plan: PhysicalPlan,
        port: CallPort,
        settings: PlanSettings,
        *,
        job: str,
        tenant: str,
        run_seq: int,
        clock: Callable[[], float],
        keep_bodies: bool = False,
    ) -> None:
        self.plan = plan
        self.port = port
        self.settings = settings
        self.job = job
        self.tenant = tenant
        self.run_seq = run_seq
        self.clock = clock
        self.keep_bodies = keep_bodies
        self._hints = PlanHints(plan, run_seq)
        self._consumers = plan.graph.consumers()
        # All mutable state.
        self.operators = {id_: OperatorRun() for id_ in plan.graph.operators}
        self.rows = [Row(len(outputs)) for outputs in plan.graph.outputs]
        self.events: deque[tuple[int, str, dict[str, Any]]] = deque(maxlen=settings.max_events)  # (seq, name, data)
        self.event_seq = 0  # of the newest event
        self.kept_bytes = self._plan_bytes()  # the plan's and the results', about
        self.began: float | None = None
        self._changed = asyncio.Event()  # replaced whenever an event is added
        self._states: Counter[OperatorState] = Counter({"waiting": len(self.operators)})
        self._texts: dict[int, str] = {}  # outputs still needed by a consumer
        self._replies: dict[int, str] = {}  # operator → response id, for the consumers' parents
        self._waiting: dict[int, int] = {}  # operator → inputs still missing
        self._unread: dict[int, int] = {}  # operator → consumers that have not finished
        self._ready: list[tuple[int, int]] = []  # heap of (rank, operator)
        self._tasks: dict[asyncio.Task[CallResult], int] = {}
        self._full = False  # the queue refused a call; start no more until one has ended
        self._window: int | None = None  # calls that may be started since then; None: any number
        self._refusals = 0  # in a row, with nothing in flight
        self._done: asyncio.Queue[asyncio.Task[CallResult]] = asyncio.Queue()
        self._wanted: dict[int, list[tuple[int, str]]] = {}  # operator → (row, output node)
        for row, outputs in enumerate(plan.graph.outputs):
            for node, id_ in outputs.items():
                self._wanted.setdefault(id_, []).append((row, node))

    def __repr__(self) -> str:
        shown = " ".join(f"{state}={count}" for state, count in self._states.items() if count)
        return f"<JobRun {self.job} {shown}>"

    def _plan_bytes(self) -> int:
        rows = {operator.row: operator.values for operator in self.plan.graph.operators.values()}
        texts = sum(len(value) for values in rows.values() for value in values.values())
        return texts + _OPERATOR_BYTES * len(self.plan.graph.operators)

    def statistics(self) -> RunStatistics:
        results = [run.result for run in self.operators.values() if run.result is not None]
        return RunStatistics(
            operators={state: count for state, count in self._states.items() if count},
            fates=Counter(result.fate for result in results),
            in_flight=len(self._tasks),
            prompt_tokens=sum(result.prompt_tokens or 0 for result in results),
            cached_tokens=sum(result.cached_tokens or 0 for result in results),
            output_tokens=sum(result.output_tokens or 0 for result in results),
        )

    def actuals(self) -> dict[int, Actual]:
        """What happened so far, for `explain`."""
        origin = self.began or 0.0
        found = {}
        for id_, run in self.operators.items():
            result = run.result
            found[id_] = Actual(
                status=run.state,
                fate=result.fate if result else None,
                worker=result.worker if result else None,
                prompt_tokens=result.prompt_tokens if result else None,
                cached_tokens=result.cached_tokens if result else None,
                output_tokens=result.output_tokens if result else None,
                started_s=None if run.started is None else round(run.started - origin, 4),
                finished_s=None if run.finished is None else round(run.finished - origin, 4),
                error=None if run.error is None else str(run.error.get("message")),
            )
        return found

    async def changed(self) -> None:
        """Wait for the next event."""
        await self._changed.wait()

    async def run(self) -> None:
        """Execute to the end. Raises only `CancelledError`, after every call has ended."""
        self.began = self.clock()
        try:
            self._prepare()
            while True:
                self._start_ready()
                if not self._tasks:
                    if not self._full:
                        break
                    await asyncio.sleep(self.settings.refused_wait_s)
                    self._full, self._window = False, 1
                    continue
                self._settle(await self._done.get())
                while not self._done.empty():
                    self._settle(self._done.get_nowait())
        finally:
            await self._abort()

    def _prepare(self) -> None:
        for id_, operator in self.plan.graph.operators.items():
            self._waiting[id_] = len(operator.deps)
            self._unread[id_] = len(self._consumers[id_])
        for id_, operator in self.plan.graph.operators.items():
            if operator.fetched is not None:
                self._fetched(id_, operator.fetched)
            elif not operator.deps:
                heapq.heappush(self._ready, (self.plan.rank[id_], id_))

    def _fetched(self, id_: int, text: str) -> None:
        now = self.clock()
        self.operators[id_].started = now
        body = {"object": "helium.cache_fetch", "choices": [{"index": 0, "message": {"content": text}}]}
        self._succeed(id_, CallResult(200, body, "hit"), text)

    def _start_ready(self) -> None:
        while self._ready and not self._full and len(self._tasks) < self.settings.max_in_flight:
            if self._window is not None:
                if not self._window:
                    return
                self._window -= 1
            _, id_ = heapq.heappop(self._ready)
            operator = self.plan.graph.operators[id_]
            settings, plan = self.settings, self.plan
            task = asyncio.create_task(
                self.port.call(
                    request_body(operator, self._texts),
                    tenant=self.tenant,
                    headers=self._headers(operator),
                    hints=self._hints.started(id_) if settings.ordering else None,
                    worker=plan.workers[plan.placement[id_]].name if settings.placement else None,
                )
            )
            self._tasks[task] = id_
            task.add_done_callback(self._done.put_nowait)
            self._turn(id_, "running")
            self.operators[id_].started = self.clock()
            self._event("operator", {"operator": operator.name, "state": "running"})
        if not self._ready:
            self._window = None  # all that could be started has been, and none was refused

    def _headers(self, operator: Operator) -> dict[str, str]:
        """The tags of live traffic, so that a plan's calls appear as runs of their workflow."""
        parents = [self._replies[dep] for dep in operator.deps if dep in self._replies][:_MOST_PARENTS]
        headers = {
            "x-helium-workflow": self.plan.graph.workflow[:_LONGEST_NAME],
            "x-helium-run": f"{self.job}/{operator.row}",
            "x-helium-node": operator.template.node,
            "x-helium-parents": ",".join(parents),
        }
        if not self._consumers[operator.id] and len(self.plan.graph.outputs[operator.row]) == 1:
            headers["x-helium-final"] = "true"
        return headers

    def _settle(self, task: asyncio.Task[CallResult]) -> None:
        id_ = self._tasks.pop(task)
        if self._refused(task):
            self._full, self._window = True, 0
            self._refusals += not self._tasks
            if self._refusals <= self.settings.max_refusals:
                self._turn(id_, "waiting")
                heapq.heappush(self._ready, (self.plan.rank[id_], id_))
                return
        self._full, self._refusals = False, 0
        if self._window is not None:
            self._window += _REGAINED
        try:
            result = task.result()
            if result.status >= 400:
                error = result.body.get("error")
                self._fail(id_, result.status, error if isinstance(error, dict) else {"message": "the call failed"})
                return
            self._succeed(id_, result, reply_text(result.body))
        except HeliumError as error:
            self._fail(id_, error.status, error.body()["error"])
        except asyncio.CancelledError:
            self._fail(id_, 499, {"message": "the call was cancelled", "type": "cancelled", "code": "cancelled"})
        except Exception:
            log.exception("plan.operator_failed", job=self.job, operator=self.plan.graph.operators[id_].name)
            self._fail(id_, 500, {"message": "internal error", "type": "server_error", "code": "internal_error"})

    @staticmethod
    def _refused(task: asyncio.Task[CallResult]) -> bool:
        if task.cancelled():
            return False
        error = task.exception()
        if error is None:
            return task.result().status == 429
        return isinstance(error, HeliumError) and error.status == 429

    def _turn(self, id_: int, state: OperatorState) -> None:
        run = self.operators[id_]
        self._states[run.state] -= 1
        self._states[state] += 1
        run.state = state

    def _succeed(self, id_: int, result: CallResult, text: str) -> None:
        run = self.operators[id_]
        self._turn(id_, "done")
        run.finished, run.status = self.clock(), result.status
        run.result = CallResult(
            result.status,
            {},
            result.fate,
            result.worker,
            result.prompt_tokens,
            result.cached_tokens,
            result.output_tokens,
        )
        if self._unread[id_]:
            self._texts[id_] = text
            if isinstance(reply := result.body.get("id"), str):
                self._replies[id_] = reply
        self._event(
            "operator",
            {
                "operator": self.plan.graph.operators[id_].name,
                "state": "done",
                "fate": result.fate,
                "worker": result.worker,
                "output_tokens": result.output_tokens,
            },
        )
        for row, node in self._wanted.get(id_, ()):
            self.rows[row].outputs[node] = text
            self.kept_bytes += len(text)
            if self.keep_bodies:
                self.rows[row].bodies[node] = result
                self.kept_bytes += len(text)  # about: the body repeats the text
            self._resolve(row)
        for consumer in self._consumers[id_]:
            self._waiting[consumer] -= 1
            if not self._waiting[consumer] and self.operators[consumer].state == "waiting":
                heapq.heappush(self._ready, (self.plan.rank[consumer], consumer))
        self._release(id_)

    def _fail(self, id_: int, status: int, error: Mapping[str, Any]) -> None:
        """Fail an operator and skip everything that depends on it."""
        names = self.plan.graph.operators
        stack: list[tuple[int, OperatorState]] = [(id_, "failed")]
        while stack:
            failed, state = stack.pop()
            run = self.operators[failed]
            if run.state not in ("waiting", "running"):
                continue
            self._turn(failed, state)
            run.finished, run.status = self.clock(), status
            run.error = error if state == "failed" else {**error, "failed_operator": names[id_].name}
            self._event("operator", {"operator": names[failed].name, "state": state, "error": dict(run.error)})
            for row, node in self._wanted.get(failed, ()):
                self.rows[row].errors[node] = run.error
                self._resolve(row)
            stack.extend((consumer, "skipped") for consumer in self._consumers[failed])
            self._release(failed)

    def _release(self, id_: int) -> None:
        """Drop the texts that only this operator was still waiting for."""
        for dep in self.plan.graph.operators[id_].deps:
            self._unread[dep] -= 1
            if not self._unread[dep]:
                self._texts.pop(dep, None)
                self._replies.pop(dep, None)

    def _resolve(self, row: int) -> None:
        result = self.rows[row]
        result.unresolved -= 1
        if result.unresolved == 0:
            result.state = "failed" if result.errors else "completed"
            self._event("input", {"input": row, "state": result.state})

    async def _abort(self) -> None:
        """Cancel what runs, wait for it, and close the books. Nothing to do after a whole run."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task, id_ in list(self._tasks.items()):
            if not task.cancelled() and task.exception() is None and task.result().status < 400:
                self._settle(task)  # it had already been answered
            else:
                self._turn(id_, "cancelled")
        self._tasks.clear()
        self.close()

    def close(self) -> None:
        """Mark what has not ended as cancelled: for a run that was stopped, or that never began."""
        for id_, run in self.operators.items():
            if run.state in ("waiting", "running"):
                self._turn(id_, "cancelled")
        for row, result in enumerate(self.rows):
            if result.state == "running":
                result.state = "cancelled"
                self._event("input", {"input": row, "state": "cancelled"})

    def _event(self, name: str, data: dict[str, Any]) -> None:
        self.event_seq += 1
        self.events.append((self.event_seq, name, data))
        self._changed.set()
        self._changed = asyncio.Event()

    def announce(self, state: str) -> None:
        """Add the event of the whole job's state."""
        self._event("job", {"state": state})


__all__ = ["CallPort", "CallResult", "JobRun", "OperatorRun", "Row", "RunStatistics", "reply_text"]
