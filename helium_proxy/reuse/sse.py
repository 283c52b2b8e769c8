"""Server-sent events, the little of them that the APIs use: splitting a byte stream into events, and writing them."""

from __future__ import annotations

import re
from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"

_BOUNDARY = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINE = re.compile(rb"\r\n|\n|\r")


class EventSplitter:
    """Cuts a byte stream, however it was chunked, at the blank lines between events.

    Holds at most one unfinished event; raises ValueError when that grows beyond `limit` bytes.
    """

    def __init__(self, limit: int = 16 * 1024 * 1024) -> None:
        self._limit = limit
        # State: bytes after the last complete event.
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes, raw, each with its blank line."""
        data = self._rest + chunk if self._rest else chunk
        if 0 <= data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:  # one event, as most chunks are
            self._rest = b""
            return [data]
        if b"\r" not in data:
            *whole, self._rest = data.split(b"\n\n")
            self._check()
            return [event + b"\n\n" for event in whole]
        events, start = [], 0
        for match in _BOUNDARY.finditer(data):
            events.append(data[start : match.end()])
            start = match.end()
        self._rest = data[start:]
        self._check()
        return events

    def _check(self) -> None:
        if len(self._rest) > self._limit:
            raise ValueError(f"an event of more than {self._limit} bytes")

    @property
    def rest(self) -> bytes:
        """Bytes of an event that has not ended."""
        return self._rest


def payload(event: bytes) -> bytes:
    """The data of one raw event: its ``data:`` lines joined by newlines; empty for a comment."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]
    lines = (line[5:].removeprefix(b" ") for line in _LINE.split(event) if line.startswith(b"data:"))
    return b"\n".join(lines)


def data_event(value: Any) -> bytes:
    """An unnamed event, as the chat and completions streams use them."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """An event named by its ``type``, as the responses and messages streams use them."""
    kind: str = value["type"]
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n"
