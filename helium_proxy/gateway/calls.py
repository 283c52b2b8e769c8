"""A call answered: from the prompt cache, by an equal call in flight, or by a worker."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import orjson
import structlog

from helium_proxy import metrics
from helium_proxy.errors import CacheMiss
from helium_proxy.gateway.afterwards import report
from helium_proxy.gateway.compute import Computer
from helium_proxy.gateway.http import RawHeaders, relayed
from helium_proxy.gateway.replies import Reply, read_reply
from helium_proxy.gateway.services import Services
from helium_proxy.gateway.ticket import Ticket
from helium_proxy.reuse import (
    Answer,
    Entry,
    Head,
    OwnStream,
    Seat,
    StreamRenamer,
    as_json,
    as_sse,
    changed,
    renamed_body,
)

log = structlog.get_logger(__name__)

CacheResult = Literal["hit", "coalesced", "miss", "bypass"]

EVENTS, JSON = b"text/event-stream; charset=utf-8", b"application/json"


@dataclass(slots=True)
class Served:
    """An answer on its way to the client: whole, or the chunks in which it comes. `close` must be called, whatever
    happened to the chunks."""

    status: int
    headers: RawHeaders
    content: bytes | AsyncIterable[bytes]
    stream: bool
    cache: CacheResult
    age_s: float | None
    close: Callable[[], None]

    async def read(self) -> bytes:
        """All of it."""
        return self.content if isinstance(self.content, bytes) else b"".join([c async for c in self.content])


class Calls:
    """Answers calls; the one way for live calls, plans and batches alike."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._computer = Computer(services)

    async def serve(self, ticket: Ticket) -> Served:
        """Raises HeliumError; CacheMiss when the client wants nothing but a cached answer and there is none."""
        if ticket.key is not None and ticket.control.may_read:
            entry = await self._cached(ticket, ticket.key)
            if entry is not None:
                return self._hit(ticket, entry)
        elif ticket.key is not None:
            metrics.CACHE_REQUESTS.labels("bypass").inc()
        if ticket.control.only_if_cached:
            raise CacheMiss("nothing is cached for this request")
        if ticket.key is not None and self._services.coalescer is not None and ticket.control.may_join:
            return await self._shared(ticket, ticket.key)
        answer = await self._computer.open(ticket)
        return self._alone(ticket, answer)

    async def _cached(self, ticket: Ticket, key: bytes) -> Entry | None:
        cache = self._services.cache
        if cache is None or not self._referable(ticket, key):
            return None
        now, oldest = self._services.wall(), ticket.control.max_age
        try:
            return cache.peek(key, now, oldest) or await cache.get(key, now, oldest)
        except Exception:
            log.exception("prompt cache failed; the call is computed")
            metrics.FAIL_OPEN.labels("reuse").inc()
            return None

    def _referable(self, ticket: Ticket, key: bytes) -> bool:
        """Whether a later call may refer to a hit: of a response that is to be stored, if a worker still has it."""
        if ticket.request.route != "/v1/responses" or ticket.request.body.get("store") is False:
            return True
        known = self._computer.replies.get(key)
        owner = self._services.pool.get(self._services.owners.get(known.id or "", "")) if known is not None else None
        return owner is not None and owner.state == "up"

    def _hit(self, ticket: Ticket, entry: Entry) -> Served:
        services, request = self._services, ticket.request
        now = services.wall()
        ticket.planned_at = ticket.head_at = services.clock()
        content: bytes | AsyncIterator[bytes]
        if ticket.stream:
            content, kind = _pieces(as_sse(entry, request.id, now, ticket.wants_usage, request.body)), EVENTS
        else:
            content, kind = as_json(entry, request.id, now, request.body), JSON
        self._original(ticket)
        report(services, ticket, "hit", read_reply({**orjson.loads(entry.body), "id": request.id}))
        return Served(200, [(b"content-type", kind)], content, ticket.stream, "hit", entry.age(now), _nothing)

    async def _shared(self, ticket: Ticket, key: bytes) -> Served:
        """As the leader of a new call, or in the seat of a follower of one that is under way."""
        coalescer = self._services.coalescer
        assert coalescer is not None
        seat = coalescer.join(key, partial(self._computer.open, ticket))
        try:
            head = await seat.head()
            if 400 <= head.status < 500 and not seat.leads:  # perhaps for something that is the leader's alone
                seat.leave()
                return self._alone(ticket, await self._computer.open(ticket))
            content = self._own(ticket, seat, head)
        except BaseException:
            seat.leave()
            raise
        if ticket.head_at is None:
            ticket.planned_at = ticket.head_at = self._services.clock()
        result: CacheResult = "miss" if seat.leads else "coalesced"
        headers = relayed(head.headers.items())
        return Served(head.status, headers, content, head.body is None, result, None, seat.leave)

    def _own(self, ticket: Ticket, seat: Seat, head: Head) -> bytes | AsyncIterable[bytes]:
        """The answer under this request's own id. What a leader gets has its id already."""
        route, request, usage = ticket.request.route, ticket.request, ticket.wants_usage
        ours = seat.leads or head.status != 200
        if head.body is None:
            assert seat.reader is not None
            if head.status != 200 or (seat.leads and not ticket.adds_usage):
                return OwnStream(seat.reader)
            change = StreamRenamer(route, None if ours else request.id, usage, request.body)
            return OwnStream(seat.reader, change, None if ours else partial(self._joined, ticket))
        if ours:
            return head.body
        self._joined(ticket)
        return renamed_body(head.body, route, request.id, request.body)

    def _joined(self, ticket: Ticket) -> None:
        """The bookkeeping of a call that joined another, at its end (a leader's is done already)."""
        report(self._services, ticket, "coalesced", self._original(ticket))

    def _original(self, ticket: Ticket) -> Reply:
        """The computed reply that this call shares, if it is remembered. A stored response can then be referred to
        under the id that this client was given."""
        assert ticket.key is not None
        known = self._computer.replies.get(ticket.key, Reply())
        if known.id is not None and ticket.request.route == "/v1/responses":
            self._services.note_alias(ticket.request.id, known.id)
        return known

    def _alone(self, ticket: Ticket, answer: Answer) -> Served:
        content = answer.content
        stream = not isinstance(content, bytes)
        if not isinstance(content, bytes) and ticket.adds_usage:
            # Without the usage chunk that was asked for in the client's stead.
            content = changed(content, StreamRenamer(ticket.request.route, None, include_usage=False))
        headers = relayed(answer.headers.items())
        looked = ticket.key is not None and ticket.control.may_read and self._services.cache is not None
        result: CacheResult = "miss" if looked else "bypass"
        return Served(answer.status, headers, content, stream, result, None, answer.close or _nothing)


async def _pieces(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def _nothing() -> None:
    pass
