"""uvicorn's HTTP protocol with a bound on request heads, which it takes at any length otherwise: a head that never
ends would fill the memory before any route sees it."""

from __future__ import annotations

from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from helium_proxy import metrics
from helium_proxy.errors import HeadersTooLarge


def bounded_protocol(max_head_bytes: int) -> type[HttpToolsProtocol]:
    """The protocol class whose connections answer a head of more than `max_head_bytes` with 431 and end."""

    class BoundedProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            # -- state
            self._head: int | None = None  # bytes of a head that has begun and is not complete
            self._too_large = False
            self._refused = False

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            super().data_received(data)
            if self._head is not None:
                self._head += len(data)
                if self._head > max_head_bytes:
                    self._refuse()

        def on_message_begin(self) -> None:
            self._head = 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head = None
            if len(self.url) + sum(len(k) + len(v) for k, v in self.headers) > max_head_bytes:
                self._too_large = True
                raise HeadersTooLarge("head")  # the parser stops, and asks for `send_400_response`
            super().on_headers_complete()

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
