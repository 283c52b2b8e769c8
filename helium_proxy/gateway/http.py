"""The HTTP side of a call, straight on ASGI: reading a bounded body, writing answers and streams, noticing that the
client has gone.

Starlette's own request and response objects are left aside on this path only: they cost more per chunk than the
whole relay, and its streaming response holds no event back only by accident of buffering.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import orjson
from starlette.types import Message, Receive, Scope, Send

from helium_proxy import metrics
from helium_proxy.errors import BodyTooLarge, ClientGone, DeadlineExceeded, Draining, HeliumError
from helium_proxy.reuse import OwnStream, Push

RawHeaders = list[tuple[bytes, bytes]]

# Of an upstream's headers, what is not the client's business or is set anew.
_NOT_RELAYED = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "trailer", "te", "content-length", "date", "server"}
)


def header_map(scope: Scope) -> dict[str, str]:
    """Request headers, names in lower case; repeated ones joined as RFC 9110 allows."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


async def read_body(headers: dict[str, str], receive: Receive, limit: int) -> bytes:
    """The request's body. Raises BodyTooLarge beyond `limit` bytes, ClientGone when it does not arrive whole."""
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(f"the body is larger than {limit} bytes")
    first = await receive()
    if first["type"] == "http.disconnect":
        raise ClientGone("the client left before its request was complete")
    body: bytes = first.get("body", b"")
    if not first.get("more_body"):
        if len(body) > limit:
            raise BodyTooLarge(f"the body is larger than {limit} bytes")
        return body
    parts = [body]
    size = len(body)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its request was complete")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLarge(f"the body is larger than {limit} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


def relayed(headers: Iterable[tuple[str, str]]) -> RawHeaders:
    """An upstream's headers as the client gets them."""
    return [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers if k.lower() not in _NOT_RELAYED]


async def send_whole(send: Send, status: int, headers: RawHeaders, body: bytes) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, (b"content-length", str(len(body)).encode())],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, status: int, value: Any, headers: RawHeaders | None = None) -> None:
    await send_whole(send, status, [(b"content-type", b"application/json"), *(headers or [])], orjson.dumps(value))


async def send_error(send: Send, error: HeliumError, headers: RawHeaders | None = None) -> None:
    metrics.ERRORS.labels(error.code or error.type).inc()
    extra = [(k.encode(), v.encode()) for k, v in error.headers().items()]
    await send_json(send, error.status, error.body(), [*(headers or []), *extra])


async def send_stream(
    send: Send, status: int, headers: RawHeaders, chunks: AsyncIterable[bytes], push: Push | None = None
) -> None:
    """Relays `chunks`, each as it comes. The head goes out with the first of them; `push` is the short way for the
    others, if there is one."""
    started = False
    if push is not None and isinstance(chunks, OwnStream):
        chunks.push_to(push)
    async for chunk in chunks:
        if push is not None and push.ready():
            push.write(chunk)
            continue
        if not started:
            started = True
            await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    if not started:
        await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


PUSH = "helium.push"
"""In the scopes of our own protocol: makes of an ASGI `send` a `Push`, which is ready once the head has been sent, or
None where that is not the protocol's own."""


class Sending:
    """An ASGI `send` that remembers the status it has sent."""

    __slots__ = ("_send", "push", "status")

    def __init__(self, send: Send, scope: Scope) -> None:
        self._send = send
        make: Callable[[Send], Push | None] | None = scope.get(PUSH)
        self.push = make(send) if make is not None else None
        # -- state
        self.status = 0
        """0: no answer has begun."""

    def __call__(self, message: Message) -> Awaitable[None]:
        if not self.status and message["type"] == "http.response.start":
            self.status = message["status"]
        return self._send(message)


GONE = "helium.gone"
"""In the scopes of our own protocol: a set of functions, called when the client goes away."""


class Watch:
    """Cancels the current task when its client goes away or its time is up, whichever is first; `stop` ends that."""

    __slots__ = ("_gone", "_task", "_timer", "_watcher", "ended_by")

    def __init__(self, scope: Scope, receive: Receive, timeout_s: float | None = None) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._gone: set[Callable[[], None]] | None = scope.get(GONE)
        # -- state
        self.ended_by: Literal["client", "time"] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        if timeout_s is not None:
            self._timer = loop.call_later(timeout_s, self.cut)
        if self._gone is not None:
            self._gone.add(self._client_left)
        else:  # another server's protocol: it tells only who asks
            self._watcher = loop.create_task(self._wait_for_client(receive))

    def cut(self) -> None:
        """The time is up now."""
        self._end("time")

    def stop(self) -> None:
        # What is dropped here would hold this object in a cycle, which then waits for the garbage collector.
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._gone is not None:
            self._gone.discard(self._client_left)
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def cancelled(self) -> bool:
        """Whether the CancelledError that has just been caught was this one's, and nobody else's."""
        return self.ended_by is not None and self._task.uncancel() == 0

    async def _wait_for_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._client_left()

    def _client_left(self) -> None:
        self._end("client")

    def _end(self, by: Literal["client", "time"]) -> None:
        if self.ended_by is None:
            self.ended_by = by
            self._task.cancel()


class Watches:
    """Of every request being answered: the proxy's own end cuts them all, as their deadlines would."""

    def __init__(self) -> None:
        # -- state
        self._all: set[Watch] = set()
        self._cut = False

    def cut(self) -> None:
        """Ends every one of them now."""
        self._cut = True
        for watch in self._all:
            watch.cut()

    @contextmanager
    def watching(self, scope: Scope, receive: Receive, timeout_s: float | None = None) -> Iterator[None]:
        """The block is cancelled as soon as the client goes away, the time is up, or everything is `cut`. Raises
        ClientGone, DeadlineExceeded or Draining then."""
        watch = Watch(scope, receive, timeout_s)
        self._all.add(watch)
        try:
            yield
        except asyncio.CancelledError:
            if not watch.cancelled():
                raise
            if watch.ended_by == "client":
                metrics.DISCONNECTS.inc()
                raise ClientGone("the client left") from None
            if self._cut:
                raise Draining("the proxy shut down before the answer was complete", retry_after=1) from None
            raise DeadlineExceeded(f"no complete answer within {timeout_s:g} s") from None
        finally:
            watch.stop()
            self._all.discard(watch)
