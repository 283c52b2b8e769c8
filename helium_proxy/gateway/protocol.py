"""uvicorn's HTTP protocol with a bound on request heads, which it takes at any length otherwise: a head that never
ends would fill the memory before any route sees it. And answers leave in one write: uvicorn makes two, of head and of
body, each a system call that wakes the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import orjson
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from helium_proxy import metrics
from helium_proxy.errors import HeadersTooLarge
from helium_proxy.gateway.http import GONE, PUSH


def _size(url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    return len(url) + sum(len(k) + len(v) for k, v in headers)


class _HeldHead:
    """The transport of one answer: its first write, the head, waits for the second, a turn of the loop at most."""

    __slots__ = ("_begun", "_head", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        # -- state
        self._begun = False
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._begun:
            self._transport.write(data)
        elif self._head:
            self._begun = True
            head, self._head = self._head, b""
            self._transport.write(head + data)
        else:
            self._head = data
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._head:
            self._begun = True
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class _Chunks:
    """The way past uvicorn's messages for the chunks of a body (`reuse.Push`): of its `send`, which costs as much as
    all the rest of relaying one, only the write is left."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def ready(self) -> bool:
        cycle = self._cycle  # `chunked_encoding` is known once the head has been sent
        if not cycle.chunked_encoding or cycle.flow.write_paused:
            return False
        return not (cycle.disconnected or cycle.response_complete)

    def write(self, chunk: bytes) -> None:
        if chunk:  # an empty one would end the body
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))


def _push(send: Send) -> _Chunks | None:
    cycle = getattr(send, "__self__", None)
    return _Chunks(cycle) if isinstance(cycle, RequestResponseCycle) else None  # not past a middleware's `send`


def bounded_protocol(max_head_bytes: int) -> type[HttpToolsProtocol]:
    """The protocol class whose connections answer a head of more than `max_head_bytes` with 431 and end."""

    class BoundedProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # -- state
            self._received = 0  # bytes that came last
            self._head: int | None = None  # bytes of a head that has begun and is not complete
            self._too_large = False
            self._refused = False
            self._gone: set[Callable[[], None]] = set()  # see `http.GONE`

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for call in list(self._gone):
                call()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            self._received = len(data)
            super().data_received(data)
            if self._head is not None:
                self._head += len(data)
                if self._head > max_head_bytes:
                    self._refuse()

        def on_message_begin(self) -> None:
            self._head = 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            came, self._head = (self._head or 0) + self._received, None  # of the head, and perhaps of the body
            if came > max_head_bytes and _size(self.url, self.headers) > max_head_bytes:
                self._too_large = True
                raise HeadersTooLarge("head")  # the parser stops, and asks for `send_400_response`
            before = self.cycle
            super().on_headers_complete()
            if self.cycle is not before:
                scope = cast(dict[str, Any], self.cycle.scope)
                scope[GONE], scope[PUSH] = self._gone, _push
                self.cycle.transport = cast(asyncio.Transport, _HeldHead(self.transport, self.loop))

        def send_400_response(self, msg: str) -> None:
            if self._too_large:
                self._refuse()
            else:
                super().send_400_response(msg)

        def _refuse(self) -> None:
            self._refused = True
            error = HeadersTooLarge(f"the request's head is larger than {max_head_bytes} bytes")
            metrics.ERRORS.labels(error.code or error.type).inc()
            body = orjson.dumps(error.body())
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
                )
            self.transport.close()

    return BoundedProtocol
