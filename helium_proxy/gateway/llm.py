"""The routes that reach a worker: model calls through workflow, reuse and dispatch; everything else of `/v1` as it
comes (`passing.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from helium_proxy import metrics
from helium_proxy.errors import (
    ClientGone,
    Draining,
    HeliumError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    UpstreamFailed,
)
from helium_proxy.gateway.afterwards import report
from helium_proxy.gateway.auth import NOBODY, Principal
from helium_proxy.gateway.bodies import as_utf8, odd, parse, tenant_salt
from helium_proxy.gateway.calls import Calls, Served
from helium_proxy.gateway.http import (
    RawHeaders,
    Sending,
    header_map,
    read_body,
    send_error,
    send_stream,
    send_whole,
)
from helium_proxy.gateway.passing import Passing, path_of, sent_headers
from helium_proxy.gateway.replies import Reply
from helium_proxy.gateway.services import Services
from helium_proxy.gateway.sse import stream_error
from helium_proxy.gateway.ticket import Ticket
from helium_proxy.reuse import cache_key, cacheable, parse_cache_control
from helium_proxy.types import POOLED_ROUTES, CallRequest, Hints
from helium_proxy.workers.upstream import SendFailed

log = structlog.get_logger(__name__)

ID_PREFIX = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/responses": "resp_",
    "/v1/messages": "chatcmpl-",
}
"""Routes whose calls belong to a workflow, and what their answers' ids begin with."""

PLANNED = POOLED_ROUTES | ID_PREFIX.keys()
"""Routes that are queued and placed; the others are cheap, and go straight to a worker."""

_SAFE_ID = re.compile(r"[\w.:-]{1,128}\Z", re.ASCII)
_PLAIN = re.compile(r"[!-~]*")


class LlmRoutes:
    """ASGI endpoints over one `Services`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._passing = Passing(services)
        self.calls = Calls(services)

    async def planned(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`PLANNED` routes."""
        status = await self._guarded(scope, receive, send, self._planned)
        metrics.HTTP_REQUESTS.labels(scope["path"], status).inc()

    async def direct(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every other route, with any method; counted where the application's own routes are."""
        await self._guarded(scope, receive, send, self._direct)

    async def _guarded(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        work: Callable[[Scope, Receive, Sending, dict[str, str], Principal], Awaitable[None]],
    ) -> int:
        """Around every request: drain, key, errors in OpenAI's form, the count of requests in flight. Returns the
        status answered."""
        services = self._services
        headers = header_map(scope)
        sending = Sending(send, scope)
        services.in_flight += 1
        try:
            if services.draining:
                raise Draining("the proxy is shutting down", retry_after=1)
            # A browser asks what it may send before it sends a key.
            principal = NOBODY if scope["method"] == "OPTIONS" else services.keyring.authenticate(headers)
            await work(scope, receive, sending, headers, principal)
        except ClientGone:
            sending.status = 499
        except HeliumError as error:
            await _fail(sending, scope, headers, error)
        except SendFailed as error:
            await _fail(sending, scope, headers, UpstreamFailed(f"the worker gave no answer ({error.kind})"))
        except Exception:
            log.exception("request failed", path=scope["path"])
            await _fail(sending, scope, headers, HeliumError("internal error"))
        finally:
            services.in_flight -= 1
        return sending.status

    # -- model calls

    async def _planned(
        self, scope: Scope, receive: Receive, send: Sending, headers: dict[str, str], principal: Principal
    ) -> None:
        services = self._services
        arrived = services.clock()
        raw = as_utf8(await read_body(headers, receive, services.settings.server.max_body_bytes))
        body = parse(raw)
        model = self._passing.model(body)
        if body is None or model is None:
            named = body.get("model") if body is not None else None
            if isinstance(named, str) and not services.keyring.open:
                # A worker that has it all the same would answer past what keeps tenants apart.
                raise ModelNotFound(f"The model `{named}` does not exist.", param="model")
            await self._passing.unread(scope, receive, send, headers, raw)
            return
        ticket = self.ticket(scope["path"], path_of(scope), raw, body, model, headers, principal, arrived)
        metrics.OVERHEAD.observe(services.clock() - arrived)
        timeout = services.settings.server.request_timeout_s
        if ticket.hints.deadline_s is not None:
            timeout = min(timeout, ticket.hints.deadline_s)
        try:
            await self._answer(ticket, scope, receive, send, timeout)
        except HeliumError as error:
            report(services, ticket, "error", Reply(), status=error.status)
            raise
        except BaseException as error:
            report(services, ticket, "error", Reply(), status=500 if isinstance(error, Exception) else 499)
            raise

    async def _direct(
        self, scope: Scope, receive: Receive, send: Sending, headers: dict[str, str], principal: Principal
    ) -> None:
        raw = await read_body(headers, receive, self._services.settings.server.max_body_bytes)
        await self._passing.direct(scope, receive, send, headers, raw, principal.tenant)

    def ticket(
        self,
        route: str,
        path: str,
        raw: bytes,
        body: dict[str, Any],
        model: str,
        headers: dict[str, str],
        principal: Principal,
        arrived: float,
        *,
        hints: Hints | None = None,
        suggestion: str | None = None,
    ) -> Ticket:
        """The call of a parsed request; `suggestion` is where a submitted plan would have it. Raises InvalidRequest
        for bad tags in strict mode only."""
        services, settings = self._services, self._services.settings
        given = headers.get("x-request-id") or body.get("request_id")
        safe = isinstance(given, str) and _SAFE_ID.match(given)
        request_id = services.unique(str(given)) if safe else os.urandom(16).hex()
        request = CallRequest(
            id=ID_PREFIX.get(route, "") + request_id,
            tenant=principal.tenant,
            route=route,
            model=model,
            body=body,
            headers=headers,
        )
        sent = sent_headers(headers)
        sent["x-request-id"] = request_id
        ticket = Ticket(request, raw, path, sent, arrived, control=parse_cache_control(headers.get("cache-control")))
        ticket.request_id = str(given) if safe else request_id
        self._stored(ticket)
        if route in ID_PREFIX and settings.mode == "full":
            try:
                ticket.arrival = services.workflows.arrive(request, arrived)
                ticket.hints = ticket.arrival.hints
                ticket.trace = services.tracer.call(ticket.arrival, headers, arrived)
                if (traceparent := ticket.trace.traceparent()) is not None:
                    sent["traceparent"] = traceparent
            except HeliumError:
                raise
            except Exception:
                log.exception("workflow room failed; the call passes through")
                metrics.FAIL_OPEN.labels("workflow").inc()
        structlog.contextvars.bind_contextvars(
            call=request_id, run=ticket.arrival.run if ticket.arrival is not None else None
        )
        if hints is not None:
            ticket.hints = hints
        ticket.suggestion = suggestion
        if settings.auth.salt_tenants:
            ticket.salt = tenant_salt(principal.tenant, body.get("cache_salt"))
        ticket.key = self._key(ticket)
        return ticket

    def _stored(self, ticket: Ticket) -> None:
        """Whose the response is that this call will store, and which it continues. Raises InvalidRequest and NotFound
        for what is another tenant's."""
        services, request = self._services, ticket.request
        if request.route == "/v1/responses":
            own = request.body.get("request_id")
            stored = own if isinstance(own, str) else request.id  # the id under which the engine stores the response
            if not services.may_see(stored, request.tenant):
                raise InvalidRequest("request_id is taken", param="request_id")
            services.note_tenant(stored, request.tenant)
        previous = request.body.get("previous_response_id")
        if isinstance(previous, str):
            if not services.may_see(previous, request.tenant):
                raise NotFound(f"Response with id '{previous}' not found.", param="response_id")
            ticket.previous = services.aliases.get(previous)
            ticket.prefer = services.owners.get(ticket.previous or previous)

    def _key(self, ticket: Ticket) -> bytes | None:
        """Under which equal calls meet; None: this one is answered alone."""
        reuse, request = self._services.settings.reuse, ticket.request
        if not (reuse.enabled or reuse.coalesce) or not ticket.plain or not ticket.tells_usage:
            return None
        if request.body.get("model") == "":
            return None  # engines differ in what they make of that
        try:
            if "origin" in request.headers or odd(ticket.raw):
                return None  # an answer with headers for one page; numbers that are none
            if cacheable(request.body, request.route):
                weights = self._services.pool.weights(request.model)
                return cache_key(request.tenant, weights, ticket.path, request.body)
        except Exception:
            log.exception("reuse failed; the call passes through")
            metrics.FAIL_OPEN.labels("reuse").inc()
        return None

    async def _answer(self, ticket: Ticket, scope: Scope, receive: Receive, send: Sending, timeout_s: float) -> None:
        error: HeliumError
        stream = False
        try:
            with self._services.watches.watching(scope, receive, timeout_s):
                served = await self.calls.serve(ticket)
                stream = served.stream
                try:
                    await self._relay(ticket, served, send)
                finally:
                    served.close()
            return
        except ClientGone:
            raise
        except HeliumError as problem:
            error = problem
        except SendFailed as problem:
            error = UpstreamFailed(str(problem))
        if not send.status:
            raise error
        metrics.ERRORS.labels(error.code or error.type).inc()
        report(self._services, ticket, "error", Reply(), status=error.status)
        if stream:
            await send({"type": "http.response.body", "body": stream_error(ticket.request.route, error)})
        else:
            await send({"type": "http.response.body", "body": b""})

    async def _relay(self, ticket: Ticket, served: Served, send: Sending) -> None:
        theirs = [(k, v) for k, v in served.headers if k != b"x-request-id"]
        headers = [*theirs, *self._own_headers(ticket, served)]
        if served.status >= 400:
            report(self._services, ticket, "error", Reply(), status=served.status)
        model = metrics.bounded("model", ticket.request.model)
        if ticket.head_at is not None:
            metrics.FIRST_TOKEN_SECONDS.labels(model).observe(ticket.head_at - ticket.arrived_at)
        content = served.content
        if isinstance(content, bytes) or not served.stream:
            body = content if isinstance(content, bytes) else await served.read()
            await send_whole(send, served.status, headers, body)
            return
        metrics.STREAMS_OPEN.inc()
        try:
            await send_stream(send, served.status, headers, content, send.push)
        finally:
            metrics.STREAMS_OPEN.dec()

    def _own_headers(self, ticket: Ticket, served: Served) -> RawHeaders:
        planned = ticket.planned_at or ticket.arrived_at
        started = ticket.started_at or planned
        head = ticket.head_at or started
        timing = (
            f"plan;dur={1e3 * (planned - ticket.arrived_at):.2f}, queue;dur={1e3 * (started - planned):.2f}, "
            f"upstream;dur={1e3 * (head - started):.2f}"
        )
        headers = [
            (b"x-helium-cache", served.cache.encode()),
            (b"x-request-id", ticket.request_id.encode("latin-1")),
            (b"server-timing", timing.encode()),
        ]
        if ticket.arrival is not None:
            headers.append((b"x-helium-run", _header(ticket.arrival.run)))
            headers.append((b"x-helium-node", _header(ticket.arrival.node)))
        if ticket.worker is not None:
            headers.append((b"x-helium-worker", ticket.worker.encode("latin-1")))
        if served.age_s is not None:
            headers.append((b"age", str(int(served.age_s)).encode()))
        return headers


async def _fail(send: Sending, scope: Scope, headers: dict[str, str], error: HeliumError) -> None:
    if send.status:  # too late for an answer of ours: the server cuts the connection, so nobody takes it for whole
        log.warning("answer cut", path=scope["path"], error=error.message)
        return
    await send_error(send, error, _request_id(headers))


def _header(value: str) -> bytes:
    """`value` in the characters a header may have."""
    if _PLAIN.fullmatch(value):
        return value.encode("ascii")
    return "".join(c if " " < c < "\x7f" else "_" for c in value).encode("ascii")


def _request_id(headers: dict[str, str]) -> RawHeaders:
    given = headers.get("x-request-id", "")
    return [(b"x-request-id", given.encode())] if _SAFE_ID.match(given) else []
