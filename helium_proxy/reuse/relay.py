"""A shared answer made one request's own: under its own id, with or without the usage it asked for.

Whoever joined a call gets the leader's upstream bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import orjson

from helium_proxy.reuse.replay import ECHOED
from helium_proxy.reuse.routes import Family, family
from helium_proxy.reuse.shared import Reader
from helium_proxy.reuse.sse import EventSplitter, named_event, payload


def renamed_body(body: bytes, route: str, new_id: str, request: Mapping[str, Any] | None = None) -> bytes:
    """A JSON body as this request's own answer; what is none stays as it is."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    return orjson.dumps(renamed(answer, route, new_id, request)) if isinstance(answer, dict) else body


def renamed(
    answer: dict[str, Any], route: str, new_id: str, request: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`answer` under another id, with the request's own echoed fields."""
    answer = {**answer, "id": new_id} if "id" in answer else dict(answer)
    if request is not None and family(route) is Family.RESPONSES:
        answer.update({name: request.get(name) for name in ECHOED if name in answer})
    return answer


async def changed(chunks: AsyncIterable[bytes], change: StreamRenamer) -> AsyncIterator[bytes]:
    """`chunks` with `change` made, each as soon as it has come."""
    try:
        async for chunk in chunks:
            if out := change.feed(chunk):
                yield out
    except Exception:
        # What was whole before the end. Not half an event: that of the error, which comes next, would be lost in it.
        if held := change.held:
            yield held
        raise
    if rest := change.rest:
        yield rest


class Push(Protocol):
    """A way to a client on which a chunk needs no waiting."""

    def ready(self) -> bool:
        """Whether the client takes a chunk right now."""

    def write(self, chunk: bytes) -> None:
        """Only when `ready`."""


class OwnStream:
    """A shared stream as one request's own: `change`, if any, is made to it. `at_end` is called when it has been read
    to its end."""

    def __init__(
        self, reader: Reader, change: StreamRenamer | None = None, at_end: Callable[[], None] | None = None
    ) -> None:
        self._reader = reader
        self._change = change
        self._at_end = at_end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = self._reader if self._change is None else changed(self._reader, self._change)
        async for chunk in chunks:
            yield chunk
        if self._at_end is not None:
            self._at_end()

    def push_to(self, client: Push) -> None:
        """Chunks may go straight to the client while whoever iterates waits for them; what it does not take at once
        comes out of the iteration."""
        change = self._change

        def push(chunk: bytes) -> bool:
            if not client.ready():
                return False
            try:
                out = chunk if change is None else change.feed(chunk)
            except Exception:  # it meets the reader, whose stream it is, once more
                return False
            if out:
                client.write(out)
            return True

        self._reader.push_to(push)


_FINISH, _USAGE, _RESPONSE = b'"finish_reason":"', b'"usage":{', b'"response":{'


class StreamRenamer:
    """Gives a live stream another response id, and leaves out the usage event that was not asked for.

    Without that event vLLM would have put the `system_fingerprint` into the event that finishes a choice: so this one
    is held until the next has come, which is there at once.

    An engine that tells usage whatever is asked (``--enable-force-include-usage``) tells it in every event: then the
    last is left where it is.

    Without a new id, and without the usage event to leave out, nothing would be changed.
    """

    def __init__(
        self, route: str, new_id: str | None, include_usage: bool, request: Mapping[str, Any] | None = None
    ) -> None:
        self._route = route
        self._family = family(route)
        self._new_id = new_id
        self._new = orjson.dumps(new_id)
        self._request = request if self._family is Family.RESPONSES and new_id is not None else None
        self._drop_usage = not include_usage and self._family in (Family.CHAT, Family.COMPLETIONS)
        # What marks an event of which more is changed than the id.
        self._marks = (*((_FINISH, _USAGE) if self._drop_usage else ()), *((_RESPONSE,) if self._request else ()))
        # State: the original's id in quotes, once an event has named it; an event that finishes a choice, held; bytes
        # of an unfinished event.
        self._old: bytes | None = self._new if new_id is None else None
        self._held = b""
        self._split = EventSplitter()

    def __repr__(self) -> str:
        return f"StreamRenamer({self._family.value}, {self._old!r} → {self._new!r})"

    @property
    def held(self) -> bytes:
        """An event that waits for the next."""
        return self._held

    @property
    def rest(self) -> bytes:
        """An event still held, and one that the stream left unfinished."""
        return self._held + self._split.rest

    def feed(self, chunk: bytes) -> bytes:
        """The events that `chunk` completes, as this request's own."""
        if self._held or self._split.rest or self._old is None or not chunk.endswith(b"\n\n"):
            return b"".join(map(self._own, self._split.feed(chunk)))
        for mark in self._marks:
            if mark in chunk:
                return b"".join(map(self._own, self._split.feed(chunk)))
        return self._named(chunk)  # whole events, and nothing in them but the id: as most chunks are

    def _own(self, event: bytes) -> bytes:
        if self._old is None:
            self._old = self._find_id(event)
        if self._drop_usage:
            held, self._held = self._held, b""
            if _USAGE in event:
                if b'"choices":[]' in event:
                    return _stamped(held, event)
                self._drop_usage, self._marks = False, ()
                return held + self._named(event)
            event = self._named(event)
            if _FINISH in event:
                self._held = event
                return held
            return held + event
        if self._request is not None and self._new_id is not None and _RESPONSE in event:
            value = orjson.loads(payload(event))
            value["response"] = renamed(value["response"], self._route, self._new_id, self._request)
            return named_event(value)
        return self._named(event)

    def _named(self, events: bytes) -> bytes:
        if self._old is None or self._new_id is None:
            return events
        return events.replace(self._old, self._new)

    def _find_id(self, event: bytes) -> bytes | None:
        try:
            value = orjson.loads(payload(event))
            match self._family:
                case Family.RESPONSES:
                    value = value.get("response")
                case Family.MESSAGES:
                    value = value.get("message")
            return orjson.dumps(value["id"])
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
            return None


def _stamped(finish: bytes, usage: bytes) -> bytes:
    """The event `finish` with the `system_fingerprint` of the usage event that came in its place."""
    try:
        mark = orjson.loads(payload(usage)).get("system_fingerprint")
    except (orjson.JSONDecodeError, AttributeError):
        return finish
    end = finish.rfind(b"}")
    if mark is None or end < 0 or b'"system_fingerprint"' in finish:
        return finish
    return finish[:end] + b',"system_fingerprint":' + orjson.dumps(mark) + finish[end:]
