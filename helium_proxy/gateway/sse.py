"""Errors inside a stream: after the first byte no status can tell of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from helium_proxy.errors import HeliumError, UpstreamFailed
from helium_proxy.workers.upstream import SendFailed


def stream_error(route: str, error: HeliumError) -> bytes:
    """`error` as the last event (or events) of a stream, in the form of the route's API."""
    if route == "/v1/messages":
        return _event({"error": {"type": "api_error", "message": error.message}})
    if route == "/v1/responses":
        return _event({"code": error.code, "message": error.message, "param": error.param})
    return b"data: " + orjson.dumps(error.body()) + b"\n\ndata: [DONE]\n\n"


async def with_end_told(chunks: AsyncIterator[bytes], route: str) -> AsyncIterator[bytes]:
    """`chunks`, and an error event where they break off."""
    try:
        async for chunk in chunks:
            yield chunk
    except SendFailed as error:
        yield stream_error(route, UpstreamFailed(f"the worker broke off ({error.kind})"))


def _event(fields: dict[str, Any]) -> bytes:
    return b"event: error\ndata: " + orjson.dumps({"type": "error", **fields}) + b"\n\n"
