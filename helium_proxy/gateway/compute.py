"""Having a call computed: estimated, queued, sent to the worker it is assigned to, elsewhere if that fails before the
first byte; and, when it is over, everybody told what really happened.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import orjson
import structlog

from helium_proxy import metrics
from helium_proxy.dispatch.state import Assignment, QueuedCall
from helium_proxy.errors import HeliumError, NoWorker, UpstreamFailed
from helium_proxy.gateway.afterwards import compare, failing_open, report, source_of
from helium_proxy.gateway.replies import Reply, read_reply
from helium_proxy.gateway.services import Services
from helium_proxy.gateway.ticket import Ticket, payload
from helium_proxy.reuse import Answer, StreamAssembler, make_entry
from helium_proxy.workers.upstream import SendFailed, Upstream
from helium_proxy.workers.worker import Worker

log = structlog.get_logger(__name__)

_RETRIED = frozenset({500, 502, 503, 504})
_BUDGET_CALLS = 200
"""The retry budget is a share of the last so many calls, and never below `_BUDGET_FLOOR`."""
_BUDGET_FLOOR = 10


class RetryBudget:
    """Bounds retries of error answers to a share of recent calls, so that an overloaded fleet is not loaded more."""

    def __init__(self, share: float) -> None:
        self._share = share
        # -- state
        self._recent: deque[int] = deque(maxlen=_BUDGET_CALLS)  # retries spent by each recent call
        self._spent = 0

    def call(self) -> None:
        if len(self._recent) == _BUDGET_CALLS:
            self._spent -= self._recent[0]
        self._recent.append(0)

    def spend(self) -> bool:
        if self._spent >= max(_BUDGET_FLOOR, self._share * len(self._recent)):
            return False
        self._spent += 1
        if self._recent:
            self._recent[-1] += 1
        return True


class Computer:
    """Has calls computed by workers."""

    def __init__(self, services: Services) -> None:
        self._services = services
        # -- state
        self._budget = RetryBudget(services.settings.pool.retry_budget)
        self.replies: dict[bytes, Reply] = {}  # by reuse key, the newest 1,024: what followers' calls came to

    async def open(self, ticket: Ticket) -> Answer:
        """The worker's answer, its first byte in hand. Raises HeliumError when no worker gives one.

        May be cancelled at any await: the engine's request is then aborted and the slot given back.
        """
        services, settings = self._services, self._services.settings.pool
        self._budget.call()
        call = await self._estimate(ticket)
        ticket.planned_at = services.clock()
        failure: HeliumError | None = None
        reason: str
        while True:
            try:
                assignment = await services.dispatcher.acquire(call)
            except NoWorker:
                if failure is not None:
                    raise failure from None
                raise
            worker = services.pool.get(assignment.worker)
            if worker is None:  # removed between decision and now
                services.dispatcher.release(assignment, ok=False, reached=False)
                call.exclude |= {assignment.worker}
                continue
            ticket.attempts += 1
            exchange = _Exchange(self, ticket, call, assignment, worker)
            try:
                answer = await exchange.open()
            except SendFailed as error:
                failure = UpstreamFailed(f"worker {worker.id} gave no answer ({error.kind})")
                reason = str(error.kind)
                free = error.kind != "timeout" and self._elsewhere(call, worker)
            else:
                denied = _denies(answer, call.model)
                if denied:
                    services.pool.doubt(worker)  # it may have restarted, with another model
                if not (denied or answer.status in _RETRIED) or not self._may_retry(ticket, call, worker):
                    return answer
                reason, free = f"status {answer.status}", False
                if ticket.attempts >= settings.max_attempts or not self._budget.spend():
                    return answer
                await _discard(answer)
            if ticket.attempts >= settings.max_attempts or (reason == "timeout" and not self._budget.spend()):
                raise failure or UpstreamFailed("no worker answered")
            metrics.RETRIES.labels(reason).inc()
            log.info("retry", worker=worker.id, reason=reason)
            call = _again(call, worker.id)
            if not free:
                pause = settings.retry_backoff_s * 2 ** (ticket.attempts - 1)
                await asyncio.sleep(random.uniform(pause / 2, pause))

    async def _estimate(self, ticket: Ticket) -> QueuedCall:
        request, estimator = ticket.request, self._services.estimator
        if self._services.settings.mode == "passthrough":
            return estimator.unknown(request, now=ticket.arrived_at, prefer=ticket.prefer)
        try:
            return await estimator.estimate(
                request,
                ticket.hints,
                now=ticket.arrived_at,
                salt=ticket.salt,
                group=ticket.arrival.template if ticket.arrival else "",
                share=ticket.arrival.share if ticket.arrival else "",
                node=ticket.node,
                prefer=ticket.prefer,
                suggestion=ticket.suggestion,
            )
        except Exception:
            log.exception("no estimate; the call is placed by load")
            metrics.FAIL_OPEN.labels("planner").inc()
            return estimator.unknown(request, now=ticket.arrived_at, prefer=ticket.prefer)

    def _may_retry(self, ticket: Ticket, call: QueuedCall, worker: Worker) -> bool:
        """Whether an error answer may be asked for elsewhere: someone else serves the model, and no state of the
        client's lives on this worker alone."""
        return ticket.prefer is None and self._elsewhere(call, worker)

    def _elsewhere(self, call: QueuedCall, failed: Worker) -> bool:
        """Whether a worker that has not failed `call` is there for it."""
        without = call.exclude | {failed.id}
        return any(w.open and w.id not in without for w in self._services.dispatcher.state.serving(call.model))

    async def keep(self, ticket: Ticket, answer: dict[str, Any], reply: Reply) -> None:
        """Remembers a complete answer for those who ask the same. Never raises."""
        key, services = ticket.key, self._services
        if key is None:
            return
        with failing_open("reuse"):
            self.replies[key] = reply
            while len(self.replies) > 1024:
                del self.replies[next(iter(self.replies))]
            if services.cache is None or not ticket.control.may_store:
                return
            request = ticket.request
            entry = make_entry(
                answer,
                route=request.route,
                tenant=request.tenant,
                model=request.model,
                workflow=ticket.workflow,
                now=services.wall(),
            )
            if entry is not None:
                await services.cache.put(key, entry)


class _Exchange:
    """One send of a call, from assignment to the last byte. Whatever happens, `_close` runs once."""

    def __init__(
        self, computer: Computer, ticket: Ticket, call: QueuedCall, assignment: Assignment, worker: Worker
    ) -> None:
        self._computer = computer
        self._services = computer._services
        self._ticket = ticket
        self._call = call
        self._assignment = assignment
        self._worker = worker
        # -- state
        self._upstream: Upstream | None = None
        self._closed = False

    async def open(self) -> Answer:
        services, ticket, worker = self._services, self._ticket, self._worker
        now = services.clock()
        ticket.worker = worker.id
        ticket.started_at = now
        worker.breaker.sent(now)
        worker.inflight += 1
        worker.sent += 1
        try:
            self._tell_started(now)
            upstream = self._upstream = await services.client.send(
                worker, "POST", ticket.path, headers=ticket.headers, body=payload(ticket, self._additions())
            )
            stream = upstream.headers.get("content-type", "").startswith("text/event-stream")
            if stream:
                chunks = upstream.chunks()
                first = await anext(chunks, b"")
                ticket.head_at = services.clock()
                services.pool.note(worker, None)
                return Answer(upstream.status, upstream.headers, self._relay(first, chunks), self._abandon)
            body = await upstream.read()
        except SendFailed as error:
            services.pool.note(worker, error)
            self._close(ok=False, reached=error.kind != "refused")
            raise
        except BaseException:
            self._close(ok=False)
            raise
        ticket.head_at = services.clock()
        services.pool.note(worker, None if upstream.status < 500 else SendFailed("timeout", f"{upstream.status}"))
        return Answer(upstream.status, upstream.headers, await self._finish_whole(upstream.status, body))

    def _tell_started(self, now: float) -> None:
        arrival = self._ticket.arrival
        with failing_open("workflow"):
            if arrival is not None:
                self._services.workflows.started(arrival.call, self._worker.id, now)

    def _additions(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._worker.facts.has_priority:
            fields["priority"] = self._assignment.engine_priority
        if self._ticket.salt:
            fields["cache_salt"] = self._ticket.salt
        if (directive := self._directive()) is not None:
            fields["kv_transfer_params"] = {"helium": directive}
        return fields

    def _directive(self) -> dict[str, Any] | None:
        services, ticket, call = self._services, self._ticket, self._call
        if ticket.arrival is None:
            return None
        key = (ticket.arrival.template, ticket.node, call.model)
        source = source_of(services, ticket)
        with failing_open("directives"):
            return services.ahead.sent(call, key, ticket.arrival.run, source, self._worker)
        return None

    async def _finish_whole(self, status: int, body: bytes) -> bytes:
        """The body as the client gets it."""
        if status != 200:
            self._close(ok=False, reached=False)
            return body
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        reply = read_reply(answer)
        self._close(ok=True, reply=reply)  # first: storing may wait, and be cancelled
        if isinstance(answer, dict):
            await self._computer.keep(self._ticket, answer, reply)
            if reply.directive is not None:  # the engine's word on ours, and nobody else's
                others = {k: v for k, v in answer["kv_transfer_params"].items() if k != "helium"}
                return orjson.dumps({**answer, "kv_transfer_params": others or None})
        return body

    async def _relay(self, first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The stream's bytes, each passed on before it is looked at: whoever asks for the next has sent this one."""
        ticket = self._ticket
        assembler = StreamAssembler(ticket.request.route)
        try:
            chunk = first
            while chunk:
                yield chunk
                assembler.feed(chunk)
                chunk = await anext(chunks, b"")
        except SendFailed as error:
            self._services.pool.note(self._worker, error)
            self._close(ok=False)
            raise UpstreamFailed(f"worker {self._worker.id} broke off ({error.kind})") from error
        except BaseException:
            self._close(ok=False)
            raise
        answer = assembler.result()
        if assembler.refused:  # the engine ended it with an error event
            self._close(ok=False)
            report(self._services, ticket, "error", Reply(), status=500)
        elif answer is None:
            self._close(ok=True, reply=Reply(text=assembler.text or None))
        else:
            reply = read_reply(answer)
            self._close(ok=True, reply=reply)
            await self._computer.keep(ticket, answer, reply)

    def _abandon(self) -> None:
        """The answer was given up, perhaps before it was read at all."""
        self._close(ok=False)

    def _close(self, *, ok: bool, reached: bool = True, reply: Reply | None = None) -> None:
        """`reached`: the engine may have computed the prompt, whatever became of the answer."""
        if self._closed:
            return
        self._closed = True
        if self._upstream is not None:
            self._upstream.close()
        self._worker.inflight -= 1
        services, ticket, assignment = self._services, self._ticket, self._assignment
        reply = reply or Reply()
        computed = None
        if reply.cached_tokens is not None:
            self._worker.tells_cached = True
        elif self._worker.tells_cached and reply.prompt_tokens is not None:
            reply = msgspec.structs.replace(reply, cached_tokens=0)  # vLLM leaves the field out then
        if reply.prompt_tokens is not None:
            computed = reply.prompt_tokens - (reply.cached_tokens or 0)
        services.dispatcher.release(
            assignment,
            ok=ok,
            reached=reached,
            computed_tokens=computed,
            output_tokens=reply.output_tokens,
        )
        with failing_open("directives"):
            whole = ok and not ticket.stream
            services.ahead.done(self._call, self._worker.id, ok=ok, report=reply.directive, whole=whole)
        if ok:
            if reply.id is not None and ticket.request.route == "/v1/responses":
                services.note_owner(reply.id, self._worker.id)
            with failing_open("estimate"):
                self._learn(reply)
            report(services, ticket, "computed", reply, predicted=assignment.cached_tokens)

    def _learn(self, reply: Reply) -> None:
        """Corrects the estimator, and notes every prediction beside what happened."""
        services, ticket, now = self._services, self._ticket, self._services.clock()
        started = ticket.started_at or now
        if reply.prompt_tokens is not None:
            services.estimator.measured(self._call, ticket.request, reply.prompt_tokens)
        if services.pool.get(self._worker.id) is self._worker:  # else its series have been dropped
            if self._assignment.predicted_s:
                compare(self._assignment, reply, now - started)
            metrics.UPSTREAM_SECONDS.labels(self._worker.id).observe(now - started)
        metrics.QUEUE_SECONDS.labels(metrics.bounded("model", self._call.model)).observe(
            max(0.0, started - ticket.planned_at)
        )


def _denies(answer: Answer, model: str) -> bool:
    """Whether the worker says that it does not have `model`."""
    said = answer.content if answer.status == 404 and isinstance(answer.content, bytes) else b""
    return model.encode(errors="replace") in said


def _again(call: QueuedCall, failed: str) -> QueuedCall:
    """The same call for another try, anywhere but at `failed`, unless it can be answered nowhere else."""
    exclude = call.exclude if call.prefer == failed else call.exclude | {failed}
    return replace(call, suggestion=None, exclude=exclude, hits={}, lane=None, passed=0)


async def _discard(answer: Answer) -> None:
    aclose = getattr(answer.content, "aclose", None)
    if aclose is not None:
        await aclose()
    if answer.close is not None:
        answer.close()
