"""Requests that go to a worker as they came: routes that are not planned, and what cannot be read here (bad JSON, an
unknown model). The engine's own answer is the right one: a client sees what it would have seen without us.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.types import Receive, Scope

from helium_proxy.errors import NotFound, NoWorker
from helium_proxy.gateway.bodies import as_utf8, encoded, extended, parse, stripped, tenant_salt
from helium_proxy.gateway.http import Sending, relayed, send_stream, send_whole
from helium_proxy.gateway.services import Services
from helium_proxy.gateway.sse import with_end_told
from helium_proxy.workers.upstream import HOP_BY_HOP, SendFailed, Upstream
from helium_proxy.workers.worker import Worker
from helium_proxy.workflow import strip_headers

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
# Possessive and bounded, for the time it takes would else grow with the square of a hostile body.
_FORM_MODEL = re.compile(rb'name="model"\r\n(?:[^\r\n]++\r\n){0,8}+\r\n([^\r\n]{1,256})\r\n')
_STORED = re.compile(r"(/v1/responses/)([^/]+)")
_FILLING = frozenset(
    {
        "/v1/chat/completions/batch",
        "/v1/systemone",
        "/v2/rerank",
        "/rerank",
        "/score",
        "/pooling",
        "/classify",
    }
)
"""Routes of vLLM's that go through here and fill KV blocks; all take `cache_salt` at the top of the body. (Those for
audio do not know it.)"""


@dataclass(frozen=True, slots=True)
class Raw:
    """A request as it is sent on."""

    method: str
    path: str
    """With its query."""
    headers: Mapping[str, str]
    body: bytes


class Passing:
    """Passes requests on, over one `Services`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._timeout_s = services.settings.server.request_timeout_s

    async def direct(
        self, scope: Scope, receive: Receive, send: Sending, headers: dict[str, str], body: bytes, tenant: str
    ) -> None:
        """A request of any route and method, to a worker of the model it names; one that names a stored response, to
        the worker that has it. Where a worker gives no answer the next is asked. Raises NotFound for a response of
        another tenant."""
        stored = _STORED.match(scope["path"])
        if stored is not None:
            if not self._services.may_see(stored[2], tenant):
                raise NotFound(f"Response with id '{stored[2]}' not found.", param="response_id")
            await self._stored(scope, receive, send, headers, body, stored[2])
            return
        kind = headers.get("content-type", "")
        form = _FORM_MODEL.search(body) if kind.startswith("multipart/") else None
        if form:
            model: str | None = form[1].decode("utf-8", "replace")
        else:
            read = parse(body)
            model = self.model(read)
            if read is not None:
                salts = self._services.settings.auth.salt_tenants and scope["path"] in _FILLING
                body = _own_body(body, read, tenant if salts else None)
        raw = Raw(scope["method"], path_of(scope), headers, body)
        workers = self._able(model)[: self._services.settings.pool.max_attempts]
        with self._services.watches.watching(scope, receive, self._timeout_s):
            await self._try(raw, workers, send)

    async def unread(
        self, scope: Scope, receive: Receive, send: Sending, headers: dict[str, str], body: bytes
    ) -> None:
        """A model call that cannot be read, which is to say that the engine will refuse it."""
        raw = Raw(scope["method"], path_of(scope), headers, body)
        worker = self._able(None)[:1]
        with self._services.watches.watching(scope, receive, self._timeout_s):
            await self._try(raw, worker, send)

    async def _stored(
        self, scope: Scope, receive: Receive, send: Sending, headers: dict[str, str], body: bytes, given: str
    ) -> None:
        """`given` is the id that the client knows; the worker may know the response by another."""
        known = self._services.aliases.get(given, given)
        path = path_of(scope).replace(given, known, 1)
        raw = Raw(scope["method"], path, headers, body)
        workers = self._holders(known)
        rename = (known.encode(), given.encode()) if known != given else None
        with self._services.watches.watching(scope, receive, self._timeout_s):
            await self._try(raw, workers, send, elsewhere_on_404=True, rename=rename)

    def _holders(self, response: str) -> list[Worker]:
        """Who may have a stored response: the worker that made it, else (after a restart of ours) all of them."""
        services = self._services
        owner = services.pool.get(services.owners.get(response, ""))
        return [owner] if owner is not None else self._able(None)

    async def _try(
        self,
        raw: Raw,
        workers: list[Worker],
        send: Sending,
        *,
        elsewhere_on_404: bool = False,
        rename: tuple[bytes, bytes] | None = None,
    ) -> None:
        """The answer of the first of `workers` that gives one. Raises SendFailed when none does."""
        services = self._services
        for left, worker in zip(range(len(workers) - 1, -1, -1), workers, strict=True):
            worker.inflight += 1
            worker.sent += 1
            try:
                sent = sent_headers(raw.headers)
                upstream = await services.client.send(
                    worker, raw.method, raw.path, headers=sent, body=raw.body or None
                )
                try:
                    if upstream.status == 404 and elsewhere_on_404 and left:
                        continue
                    await self._answer(raw, worker, upstream, send, rename)
                    return
                finally:
                    upstream.close()
            except SendFailed as error:
                services.pool.note(worker, error)
                if not left or error.kind == "timeout" or send.status:  # an answer that has begun goes on or breaks
                    raise
            finally:
                worker.inflight -= 1

    async def _answer(
        self, raw: Raw, worker: Worker, upstream: Upstream, send: Sending, rename: tuple[bytes, bytes] | None
    ) -> None:
        own = [*relayed(upstream.headers.items()), (b"x-helium-worker", worker.id.encode("latin-1"))]
        if "location" in upstream.headers:
            url = worker.spec.url
            own = [
                (k, _from_here(v.decode("latin-1"), url).encode("latin-1") if k == b"location" else v) for k, v in own
            ]
        if upstream.headers.get("content-type", "").startswith("text/event-stream"):
            await send_stream(send, upstream.status, own, with_end_told(upstream.chunks(), raw.path))
            return
        if rename is None and "content-length" not in upstream.headers:  # made as it goes: audio, lines of JSON
            await send_stream(send, upstream.status, own, upstream.chunks())
            return
        answer = await upstream.read()
        await send_whole(send, upstream.status, own, answer.replace(*rename) if rename else answer)

    def model(self, body: dict[str, Any] | None) -> str | None:
        """The model a body asks for, if some worker has it; where it names none, the one that the least loaded worker
        would take, as engines do."""
        services = self._services
        if body is None:
            return None
        model = body.get("model")
        if isinstance(model, str) and model:
            if services.dispatcher.state.serving(model) or not services.pool.models():
                return model
            return None
        if model is not None and model != "":
            return None
        up = [w for w in services.pool if w.state == "up" and w.facts.models]
        return min(up, key=lambda w: w.inflight).facts.models[0].id if up else None

    def _able(self, model: str | None) -> list[Worker]:
        """Workers that are up, of `model` if any has it, the least loaded first. Raises NoWorker."""
        up = [w for w in self._services.pool if w.state == "up"]
        able = [w for w in up if model is not None and w.serves(model)] or up
        if not able:
            raise NoWorker("no worker is up", retry_after=5)
        return sorted(able, key=lambda w: w.inflight)


def sent_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a request's headers, those that a worker sees."""
    return {k: v for k, v in strip_headers(headers).items() if k not in _NOT_SENT}


def _from_here(location: str, worker_url: str) -> str:
    """Where a worker sends a client on to, which cannot reach that worker: without its address, and without what
    comes before the API's paths in it."""
    try:
        there, worker = urlsplit(location), urlsplit(worker_url)
        # A port that a scheme implies may be left out, and a worker behind TLS does not know that it is.
        ports = [None if url.port in (80, 443) else url.port for url in (there, worker)]
        same = there.hostname == worker.hostname and ports[0] == ports[1]
    except ValueError:
        return location
    if not same:
        return location
    path = there.path
    if worker.path and (path + "/").startswith(worker.path + "/"):
        path = path[len(worker.path) :]
    # With two slashes at its beginning it would name another host.
    return there._replace(scheme="", netloc="", path="/" + path.lstrip("/")).geturl()


def _own_body(raw: bytes, body: dict[str, Any], tenant: str | None) -> bytes:
    """`raw`, which reads `body`, without what is the proxy's alone to say, and with the salt of `tenant`, if any.
    Where nothing has to go, its bytes stay, with the salt at their end."""
    kept, changed = stripped(body)
    own = body.get("cache_salt")
    if tenant is not None and (own is None or isinstance(own, str)):  # others the engine refuses
        salt = tenant_salt(tenant, own)
        if not changed and "cache_salt" not in body:
            return extended(as_utf8(raw), body, {"cache_salt": salt})
        kept, changed = {**kept, "cache_salt": salt}, True
    return encoded(kept, raw) if changed else raw


def path_of(scope: Scope) -> str:
    """The path as the client wrote it, with its query."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    return (raw + b"?" + query if query else raw).decode("latin-1")
