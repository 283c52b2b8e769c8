"""What is noted of a call that is over: the workflow room, the tracer and the metrics are told what became of it."""

from __future__ import annotations

from types import TracebackType

import structlog

from helium_proxy import metrics
from helium_proxy.dispatch.state import Assignment
from helium_proxy.gateway.ahead import Ended
from helium_proxy.gateway.prewarm import Source
from helium_proxy.gateway.replies import Reply
from helium_proxy.gateway.services import Services
from helium_proxy.gateway.ticket import Ticket
from helium_proxy.types import Fate, Outcome

log = structlog.get_logger(__name__)


class failing_open:
    """A bug in `room` costs its benefit, never the answer."""

    __slots__ = ("_room",)

    def __init__(self, room: str) -> None:
        self._room = room

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error("a room failed; the call goes on without it", room=self._room, exc_info=error)
        metrics.FAIL_OPEN.labels(self._room).inc()
        return True


def compare(assignment: Assignment, reply: Reply, took_s: float) -> None:
    """Every prediction beside what happened, in metrics."""
    if reply.cached_tokens is not None:
        metrics.PREDICTED_CACHED.labels(assignment.worker).inc(assignment.cached_tokens)
        metrics.ACTUAL_CACHED.labels(assignment.worker).inc(reply.cached_tokens)
        metrics.CACHED_ERROR.observe(abs(assignment.cached_tokens - reply.cached_tokens))
    if reply.output_tokens:
        metrics.OUTPUT_RATIO.observe(assignment.call.output_tokens / reply.output_tokens)
    if took_s > 0:
        metrics.FINISH_RATIO.observe(assignment.predicted_s / took_s)


def report(
    services: Services,
    ticket: Ticket,
    fate: Fate,
    reply: Reply,
    *,
    status: int = 200,
    predicted: int | None = None,
) -> None:
    """A call is over: the workflow room and the metrics are told. Never raises."""
    now = services.clock()
    outcome = Outcome(
        fate=fate,
        worker=ticket.worker,
        status=status,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        predicted_cached_tokens=predicted,
        output_tokens=reply.output_tokens,
        queued_at=ticket.arrived_at,
        started_at=ticket.started_at,
        first_token_at=ticket.head_at,
        finished_at=now,
        reply_text=reply.text,
        reply_tool_calls=reply.tool_calls,
        reply_id=reply.id,
    )
    try:
        if ticket.arrival is not None:
            services.workflows.finished(ticket.arrival.call, outcome, now)
            if fate != "error":
                template, source = ticket.arrival.template, source_of(services, ticket)
                services.ahead.ended(Ended(ticket.arrival.call, template, ticket.worker, source, reply.text))
        _trace(ticket, outcome)
    except Exception:
        log.exception("workflow bookkeeping failed")
        metrics.FAIL_OPEN.labels("workflow").inc()
    count(services, ticket, fate, reply, now)
    if services.settings.log.access:
        log.info(
            "call",
            fate=fate,
            status=status,
            model=ticket.request.model,
            worker=ticket.worker,
            seconds=round(now - ticket.arrived_at, 3),
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            output_tokens=reply.output_tokens,
        )


def source_of(services: Services, ticket: Ticket) -> Source:
    """What the tokens of a call's prompt can be made from later."""
    if ticket.source is None:
        request = ticket.request
        own = request.body.get("cache_salt")
        salt = ticket.salt or (own if isinstance(own, str) else "")
        size = services.tokenizers.block_size(request.model)
        ticket.source = Source(request.route, request.model, request.body, salt, size)
    return ticket.source


def _trace(ticket: Ticket, outcome: Outcome) -> None:
    """The call's span with its parts: plan, queue, upstream."""
    if ticket.trace is None:
        return
    if ticket.planned_at:
        ticket.trace.event("plan", ticket.arrived_at, ticket.planned_at)
    if ticket.started_at is not None:
        ticket.trace.event("queue", ticket.planned_at, ticket.started_at)
        ticket.trace.event("upstream", ticket.started_at, outcome.finished_at)
    ticket.trace.end(outcome)


def count(services: Services, ticket: Ticket, fate: Fate, reply: Reply, now: float) -> None:
    """The metrics of one call."""
    workflow, node = metrics.bounded("workflow", ticket.workflow), metrics.bounded("node", ticket.node)
    model = ticket.request.model  # of an error's nobody may have heard
    model = metrics.bounded("model", model, admit=fate != "error" or bool(services.dispatcher.state.serving(model)))
    metrics.CALLS.labels(workflow, node, model, fate).inc()
    metrics.CALL_SECONDS.labels(model).observe(now - ticket.arrived_at)
    prompt, output, cached = reply.prompt_tokens or 0, reply.output_tokens or 0, reply.cached_tokens or 0
    if fate == "error" or not prompt:
        return
    tokens = metrics.PROMPT_TOKENS
    if fate == "computed":
        tokens.labels(workflow, node, "computed").inc(max(0, prompt - cached))
        metrics.OUTPUT_TOKENS.labels(workflow, node, "computed").inc(output)
        if cached:
            tokens.labels(workflow, node, "kv_hit").inc(cached)
            metrics.SAVED_SECONDS.labels(workflow, "kv_hit").inc(_engine_seconds(services, ticket, cached, 0))
        return
    by = "prompt_cache" if fate == "hit" else "coalesced"
    tokens.labels(workflow, node, by).inc(prompt)
    metrics.OUTPUT_TOKENS.labels(workflow, node, by).inc(output)
    metrics.SAVED_SECONDS.labels(workflow, by).inc(_engine_seconds(services, ticket, prompt, output))


def _engine_seconds(services: Services, ticket: Ticket, prompt: int, output: int) -> float:
    """What so many tokens cost, at the rates of the worker that computed the call, or of any of its model."""
    state = services.dispatcher.state
    worker = state.workers.get(ticket.worker or "") or next(iter(state.serving(ticket.request.model)), None)
    return worker.rates.seconds(prompt, output) if worker is not None else 0.0
