"""The routes that reach a worker: model calls through workflow, reuse and dispatch; everything else of `/v1` as it
comes.

Whatever cannot be read here (bad JSON, an unknown model, a route we do not know) goes to a worker unchanged: the
engine's own answer is the right one, and a client sees what it would have seen without us.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from json import loads as slow_loads
from typing import Any

import orjson
import structlog
from starlette.types import Receive, Scope, Send

from helium_proxy import metrics
from helium_proxy.errors import (
    ClientGone,
    DeadlineExceeded,
    Draining,
    HeliumError,
    NoWorker,
    UpstreamFailed,
)
from helium_proxy.gateway.auth import Principal
from helium_proxy.gateway.calls import Calls, Served
from helium_proxy.gateway.compute import report
from helium_proxy.gateway.http import (
    RawHeaders,
    header_map,
    read_body,
    relayed,
    send_error,
    send_stream,
    send_whole,
    while_connected,
)
from helium_proxy.gateway.replies import Reply
from helium_proxy.gateway.services import Services
from helium_proxy.gateway.ticket import Ticket
from helium_proxy.reuse import cache_key, cacheable, parse_cache_control
from helium_proxy.types import CallRequest, Hints
from helium_proxy.workers.upstream import HOP_BY_HOP, SendFailed
from helium_proxy.workers.worker import Worker
from helium_proxy.workflow import strip_headers

log = structlog.get_logger(__name__)

ID_PREFIX = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/responses": "resp_",
    "/v1/messages": "chatcmpl-",
}
"""Routes whose calls belong to a workflow, and what their answers' ids begin with."""

PLANNED = frozenset({*ID_PREFIX, "/v1/embeddings", "/v1/rerank", "/v1/score"})
"""Routes that are queued and placed; the others are cheap, and go straight to a worker."""

# The client's own credentials and what describes its connection to us stay here.
_NOT_SENT = HOP_BY_HOP | {
    "authorization",
    "x-api-key",
    "host",
    "content-length",
    "expect",
    "accept-encoding",
    "cookie",
}
_SAFE_ID = re.compile(r"[\w.:-]{1,128}\Z", re.ASCII)
_FORM_MODEL = re.compile(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]{1,256})\r\n')


class LlmRoutes:
    """ASGI endpoints over one `Services`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.calls = Calls(services)

    async def planned(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`PLANNED` routes."""
        await self._guarded(scope, receive, send, self._planned)

    async def direct(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every other route, with any method."""
        await self._guarded(scope, receive, send, self._direct)

    async def _guarded(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        work: Callable[[Scope, Receive, Send, dict[str, str], Principal], Awaitable[None]],
    ) -> None:
        """Around every request: drain, key, errors in OpenAI's form, the count of requests in flight."""
        services = self._services
        headers = header_map(scope)
        status = 0  # 0: no answer has begun

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def fail(error: HeliumError) -> None:
            nonlocal status
            if status:  # too late for an answer of ours: the server cuts the connection, so nobody takes it for whole
                log.warning("answer cut", path=scope["path"], error=error.message)
                return
            status = error.status
            await send_error(send, error, _request_id(headers))

        services.in_flight += 1
        try:
            if services.draining:
                raise Draining("the proxy is shutting down", retry_after=1)
            principal = services.keyring.authenticate(headers)
            await work(scope, receive, counted, headers, principal)
        except ClientGone:
            status = 499
        except HeliumError as error:
            await fail(error)
        except SendFailed as error:
            await fail(UpstreamFailed(f"the worker gave no answer ({error.kind})"))
        except Exception:
            log.exception("request failed", path=scope["path"])
            await fail(HeliumError("internal error"))
        finally:
            services.in_flight -= 1
            route = scope["path"] if scope["path"] in PLANNED else "other"
            metrics.HTTP_REQUESTS.labels(route, str(status)).inc()

    # -- model calls

    async def _planned(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], principal: Principal
    ) -> None:
        services = self._services
        arrived = services.clock()
        raw = await read_body(headers, receive, services.settings.server.max_body_bytes)
        body = _parse(raw)
        model = self._model(body)
        if body is None or model is None:
            await while_connected(receive, lambda: self._pass(scope, raw, headers, self._able(None)[0], send))
            return
        ticket = self.ticket(scope["path"], _path(scope), raw, body, model, headers, principal, arrived)
        metrics.OVERHEAD.observe(services.clock() - arrived)
        timeout = services.settings.server.request_timeout_s
        if ticket.hints.deadline_s is not None:
            timeout = min(timeout, ticket.hints.deadline_s)
        try:
            await while_connected(receive, lambda: self._answer(ticket, send, timeout))
        except HeliumError as error:
            report(services, ticket, "error", Reply(), status=error.status)
            raise
        except BaseException:
            report(services, ticket, "error", Reply(), status=499)
            raise

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
        request_id = services.unique(str(given)) if safe else uuid.uuid4().hex
        request = CallRequest(
            id=ID_PREFIX.get(route, "") + request_id,
            tenant=principal.tenant,
            route=route,
            model=model,
            body=body,
            headers=headers,
        )
        sent = {k: v for k, v in strip_headers(headers).items() if k not in _NOT_SENT}
        sent["x-request-id"] = request_id
        ticket = Ticket(request, raw, path, sent, arrived, control=parse_cache_control(headers.get("cache-control")))
        ticket.request_id = str(given) if safe else request_id
        if route in ID_PREFIX:
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
        if hints is not None:
            ticket.hints = hints
        previous = body.get("previous_response_id")
        if isinstance(previous, str):
            ticket.previous = services.aliases.get(previous)
            ticket.prefer = services.owners.get(ticket.previous or previous)
        ticket.suggestion = suggestion
        if settings.auth.salt_tenants:
            own, tenant = body.get("cache_salt"), principal.tenant
            ticket.salt = f"{len(tenant)}:{tenant}" + (f":{own}" if isinstance(own, str) else "")
        ticket.key = self._key(ticket)
        return ticket

    def _key(self, ticket: Ticket) -> bytes | None:
        """Under which equal calls meet; None: this one is answered alone."""
        reuse, request = self._services.settings.reuse, ticket.request
        if not (reuse.enabled or reuse.coalesce) or not ticket.plain:
            return None
        try:
            if cacheable(request.body, request.route):
                return cache_key(request.tenant, request.model, ticket.path, request.body)
        except Exception:
            log.exception("reuse failed; the call passes through")
            metrics.FAIL_OPEN.labels("reuse").inc()
        return None

    async def _answer(self, ticket: Ticket, send: Send, timeout: float) -> None:
        started = False

        async def noting(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(timeout) as limit:
                self._services.limits.add(limit)
                try:
                    served = await self.calls.serve(ticket)
                    try:
                        await self._relay(ticket, served, noting)
                    finally:
                        served.close()
                finally:
                    self._services.limits.discard(limit)
        except TimeoutError:
            error: HeliumError = DeadlineExceeded(f"no complete answer within {timeout:g} s")
            if self._services.cut:
                error = Draining("the proxy shut down before the answer was complete", retry_after=1)
        except HeliumError as problem:
            error = problem
        except SendFailed as problem:
            error = UpstreamFailed(str(problem))
        else:
            return
        if not started:
            raise error
        metrics.ERRORS.labels(error.code or error.type).inc()
        report(self._services, ticket, "error", Reply(), status=error.status)
        if ticket.stream:
            await send({"type": "http.response.body", "body": _stream_error(ticket.request.route, error)})
        else:
            await send({"type": "http.response.body", "body": b""})

    async def _relay(self, ticket: Ticket, served: Served, send: Send) -> None:
        theirs = [(k, v) for k, v in served.headers if k != b"x-request-id"]
        headers = [*theirs, *self._own_headers(ticket, served)]
        if served.status >= 400:
            report(self._services, ticket, "error", Reply(), status=served.status)
        model = metrics.bounded("model", ticket.request.model)
        if ticket.head_at is not None:
            metrics.FIRST_TOKEN_SECONDS.labels(model).observe(ticket.head_at - ticket.arrived_at)
        if not served.stream:
            body = b"".join([chunk async for chunk in served.chunks])
            await send_whole(send, served.status, headers, body)
            return
        metrics.STREAMS_OPEN.inc()
        try:
            await send_stream(send, served.status, headers, served.chunks)
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

    # -- everything else

    async def _direct(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], principal: Principal
    ) -> None:
        raw = await read_body(headers, receive, self._services.settings.server.max_body_bytes)
        stored = re.match(r"/v1/responses/([^/]+)", scope["path"])
        given = b""
        if stored:
            known = self._services.aliases.get(stored[1])
            if known is not None:
                given = stored[1].encode()
                path = scope["path"].replace(stored[1], known, 1)
                scope = {**scope, "path": path, "raw_path": path.encode()}
            workers = self._holders(known or stored[1])
        else:
            kind = headers.get("content-type", "")
            form = _FORM_MODEL.search(raw) if kind.startswith("multipart/") else None
            model = form[1].decode("utf-8", "replace") if form else self._model(_parse(raw))
            workers = self._able(model)[: self._services.settings.pool.max_attempts]
        for last, worker in ((i == len(workers) - 1, w) for i, w in enumerate(workers)):
            take_404 = last or not stored
            if await self._try(scope, raw, headers, worker, send, receive, last=last, take_404=take_404, given=given):
                return

    def _holders(self, response: str) -> list[Worker]:
        """Who may have a stored response: the worker that made it, else (after a restart of ours) all of them."""
        services = self._services
        owner = services.pool.get(services.owners.get(response, ""))
        if owner is not None:
            return [owner]
        up = [w for w in services.pool if w.state == "up"]
        if not up:
            raise NoWorker("no worker is up", retry_after=5)
        return up

    async def _try(
        self,
        scope: Scope,
        raw: bytes,
        headers: dict[str, str],
        worker: Worker,
        send: Send,
        receive: Receive,
        *,
        last: bool,
        take_404: bool,
        given: bytes,
    ) -> bool:
        """Passes the request to `worker`; False when another should be asked: it gave no answer, or one of 404 and
        not `take_404`. `given`: the id by which the client knows what the path names by another."""
        answered = False

        async def work() -> None:
            nonlocal answered
            answered = await self._pass(scope, raw, headers, worker, send, last=last, take_404=take_404, given=given)

        await while_connected(receive, work)
        return answered

    async def _pass(
        self,
        scope: Scope,
        raw: bytes,
        headers: dict[str, str],
        worker: Worker,
        send: Send,
        *,
        last: bool = True,
        take_404: bool = True,
        given: bytes = b"",
    ) -> bool:
        sent = {k: v for k, v in strip_headers(headers).items() if k not in _NOT_SENT}
        worker.inflight += 1
        try:
            try:
                upstream = await self._services.client.send(
                    worker, scope["method"], _path(scope), headers=sent, body=raw or None
                )
            except SendFailed as error:
                self._services.pool.note(worker, error)
                if last or error.kind == "timeout":
                    raise
                return False
            try:
                if upstream.status == 404 and not take_404:
                    return False
                own = [*relayed(upstream.headers.items()), (b"x-helium-worker", worker.id.encode("latin-1"))]
                if upstream.headers.get("content-type", "").startswith("text/event-stream"):
                    chunks = _with_its_end_told(upstream.chunks(), scope["path"])
                    await send_stream(send, upstream.status, own, chunks)
                else:
                    answer = await upstream.read()
                    if given:
                        answer = answer.replace(scope["path"].split("/")[3].encode(), given)
                    await send_whole(send, upstream.status, own, answer)
            finally:
                upstream.close()
        finally:
            worker.inflight -= 1
        return True

    def _model(self, body: dict[str, Any] | None) -> str | None:
        """The model a body asks for, if some worker has it; the only one served, if it names none."""
        services = self._services
        model = body.get("model") if body is not None else None
        if isinstance(model, str) and model:
            if services.dispatcher.state.serving(model) or not services.pool.models():
                return model
            return None
        models = services.pool.models()
        return next(iter(models)) if len(models) == 1 and model is None else None

    def _able(self, model: str | None) -> list[Worker]:
        """Workers that are up, of `model` if any has it, the least loaded first. Raises NoWorker."""
        up = [w for w in self._services.pool if w.state == "up"]
        able = [w for w in up if model is not None and w.serves(model)] or up
        if not able:
            raise NoWorker("no worker is up", retry_after=5)
        return sorted(able, key=lambda w: w.inflight)


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The JSON object in `raw`, or None."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            body = slow_loads(raw.decode())  # integers of more than 64 bits, NaN, a lone surrogate
        except (ValueError, RecursionError):
            return None
    return body if isinstance(body, dict) else None


def _path(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (raw + b"?" + query if query else raw).decode("latin-1")


def _header(value: str) -> bytes:
    """`value` in the characters a header may have."""
    return "".join(c if " " < c < "\x7f" else "_" for c in value).encode("ascii")


def _request_id(headers: dict[str, str]) -> RawHeaders:
    given = headers.get("x-request-id", "")
    return [(b"x-request-id", given.encode())] if _SAFE_ID.match(given) else []


async def _with_its_end_told(chunks: AsyncIterator[bytes], path: str) -> AsyncIterator[bytes]:
    """`chunks`, and an error event where they break off."""
    try:
        async for chunk in chunks:
            yield chunk
    except SendFailed as error:
        yield _stream_error(path, UpstreamFailed(f"the worker broke off ({error.kind})"))


def _stream_error(route: str, error: HeliumError) -> bytes:
    """An error after the first byte, in the form of the route's stream."""
    if route == "/v1/messages":
        return _error_event({"error": {"type": "api_error", "message": error.message}})
    if route == "/v1/responses":
        return _error_event({"code": error.code, "message": error.message, "param": error.param})
    return b"data: " + orjson.dumps(error.body()) + b"\n\ndata: [DONE]\n\n"


def _error_event(fields: dict[str, Any]) -> bytes:
    return b"event: error\ndata: " + orjson.dumps({"type": "error", **fields}) + b"\n\n"
