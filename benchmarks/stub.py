"""A zero-latency OpenAI upstream, so that what is measured is the proxy in front of it.

    python -m benchmarks.stub --port 9000

Answers every request from bytes made at start. A chat call whose body has ``"stream":true`` gets `--chunks` SSE
chunks, `--rate` a second, each with the monotonic clock's nanoseconds at which it was written, so that a reader on
the same machine knows each chunk's delay. Parsing is httptools' on a bare protocol; nothing is validated.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import cast

import click
import httptools
import uvloop

MODEL = "demo"
_REPLY = {
    "id": "chatcmpl-stub",
    "object": "chat.completion",
    "created": 1,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "All is well. " * 8},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 1000,
        "total_tokens": 1032,
        "completion_tokens": 32,
        "prompt_tokens_details": {"cached_tokens": 512},
    },
}
_MODELS = {
    "object": "list",
    "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "stub", "max_model_len": 8192}],
}
# The KV is what an 8B model leaves free on a card of 80 GB.
_METRICS = "\n".join(
    f'{name}{{model_name="{MODEL}",engine="0"}} 0'
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:prompt_tokens_cached_total",
        "vllm:generation_tokens_total",
    )
) + ('\nvllm:cache_config_info{block_size="16",num_gpu_blocks="25000",kv_cache_size_tokens="400000",engine="0"} 1\n')


def _response(body: bytes, content_type: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (
        content_type,
        len(body),
        body,
    )


def _json(value: object) -> bytes:
    return _response(json.dumps(value).encode(), b"application/json")


_FIXED = {
    b"/health": _response(b"", b"text/plain"),
    b"/v1/models": _json(_MODELS),
    b"/metrics": _response(_METRICS.encode(), b"text/plain; version=0.0.4"),
    b"/version": _json({"version": "0.32.0"}),
    b"/get_model_info": _json({"model_path": MODEL}),
    b"/server_info": _json({"model_id": MODEL}),
}
_CHAT = _json(_REPLY)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _event(data: bytes) -> bytes:
    line = b"data: %b\n\n" % data
    return b"%x\r\n%b\r\n" % (len(line), line)


def _chunk(content: str) -> bytes:
    return _event(
        json.dumps(
            {
                "id": "chatcmpl-stub",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": MODEL,
                "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}],
            }
        ).encode()
    )


class StubProtocol(asyncio.Protocol):
    """One connection; requests are answered in order, streams by a task."""

    def __init__(self, chunks: int, rate: float) -> None:
        self._chunks = chunks
        self._rate = rate
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._url = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.close()

    def on_message_begin(self) -> None:
        self._url, self._body = b"", b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._transport is None:
            return
        path = self._url.partition(b"?")[0]
        if path == b"/tokenize":
            count = max(1, len(self._body) // 5)
            answer = {"count": count, "max_model_len": 8192, "tokens": list(range(count))}
            self._transport.write(_json(answer))
        elif path in _FIXED:
            self._transport.write(_FIXED[path])
        elif b'"stream":true' in self._body or b'"stream": true' in self._body:
            self._task = asyncio.ensure_future(self._stream())
        else:
            self._transport.write(_CHAT)

    async def _stream(self) -> None:
        began = time.monotonic()
        self._write(_STREAM_HEAD)
        for index in range(self._chunks):
            await asyncio.sleep(max(0.0, began + index / self._rate - time.monotonic()))
            self._write(_chunk(str(time.monotonic_ns())))
        self._write(_event(b"[DONE]") + b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


@click.command()
@click.option("--port", required=True, type=int)
@click.option("--chunks", default=100, help="Chunks of a stream.")
@click.option("--rate", default=50.0, help="Chunks per second and stream.")
def main(port: int, chunks: int, rate: float) -> None:
    """Serve until killed."""

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: StubProtocol(chunks, rate), "127.0.0.1", port, reuse_address=True)
        await server.serve_forever()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
