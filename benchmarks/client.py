"""The benchmark's HTTP client: plain OpenAI chat calls, every one recorded.

What a call's body carries besides the call itself is the system's choice (`Decorate`): nothing, Helium's tags, or a
peer's own program id. Failed calls are retried as openai-python does: twice, on 408, 409, 429 and 5xx, after 0.5 s
and 1 s.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from .workloads import Call

Decorate = Callable[[dict[str, Any], Call], None]
"""Adds a system's own fields to a request body, in place."""

_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
_BACKOFF_S = (0.5, 1.0)


class CallFailed(Exception):
    """A call got no answer, retries included; its run ends here."""


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call as the client saw it. Times are seconds since the measurement began."""

    workflow: str
    run: str
    node: str
    start: float
    first_token: float | None
    """Of streamed calls only."""
    end: float
    reply: str
    retries: int
    cache: str | None
    """The response's ``X-Helium-Cache``, where there is one."""
    follows: bool = False
    """The call has parents: a reply came before it."""


def leave_alone(body: dict[str, Any], call: Call) -> None:
    """An untagged client: the body as it is."""


def is_streamed(call: Call, every: int) -> bool:
    """Whether this call is one of the streamed sample: one in `every`, the same ones on every system."""
    return every > 0 and zlib.crc32(f"{call.run}/{call.node}".encode()) % every == 0


class HttpCaller:
    """Answers the programs' calls over HTTP, round robin over `urls` (one, when it is a proxy's)."""

    def __init__(
        self, urls: Sequence[str], model: str, decorate: Decorate = leave_alone, *, stream_every: int = 8
    ) -> None:
        self._urls = itertools.cycle(urls)
        self.model = model
        self._decorate = decorate
        self._stream_every = stream_every
        self._origin = time.perf_counter()
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)  # engines close idle connections after 5 s
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=900),
            json_serialize=lambda o: orjson.dumps(o).decode(),
        )
        # All mutable state: finished calls; every distinct prompt (its messages as JSON) with the number of times it
        # was sent, and its reply; what failed.
        self.records: list[CallRecord] = []
        self.prompts: dict[bytes, int] = {}
        self.replies: dict[bytes, str] = {}
        self.failures: list[str] = []
        self.finished: float | None = None  # `perf_counter` at the end of the batch, where its driver knows better

    def __repr__(self) -> str:
        return f"HttpCaller({len(self.records)} calls, {len(self.failures)} failed)"

    async def __aenter__(self) -> HttpCaller:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def complete(self, call: Call) -> str:
        """The reply's text.

        Raises:
            CallFailed: no 200 after all retries.
        """
        messages = list(call.messages)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": call.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        streamed = is_streamed(call, self._stream_every)
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        self._decorate(body, call)
        key = self.note(call)
        payload = orjson.dumps(body)
        start = time.perf_counter() - self._origin
        for retry in range(len(_BACKOFF_S) + 1):
            status, reply, first, cache = await self._attempt(payload, streamed)
            if status == 200:
                self.replies[key] = reply
                self.records.append(
                    CallRecord(
                        workflow=call.workflow,
                        run=call.run,
                        node=call.node,
                        start=start,
                        first_token=first,
                        end=time.perf_counter() - self._origin,
                        reply=reply,
                        retries=retry,
                        cache=cache,
                        follows=bool(call.parents),
                    )
                )
                return reply
            if status not in _RETRIED or retry == len(_BACKOFF_S):
                break
            await asyncio.sleep(_BACKOFF_S[retry])
        self.failures.append(f"{call.run}/{call.node}: {status} {reply[:300]}")
        raise CallFailed(self.failures[-1])

    def note(self, call: Call, reply: str | None = None) -> bytes:
        """Count a prompt as sent; its key in `prompts`."""
        key = orjson.dumps(list(call.messages))
        self.prompts[key] = self.prompts.get(key, 0) + 1
        if reply is not None:
            self.replies[key] = reply
        return key

    async def post_json(self, path: str, body: object) -> dict[str, Any]:
        """POST to the system itself (not counted as a call). Raises `CallFailed`."""
        url = f"{next(self._urls)}{path}"
        async with self._session.post(url, data=orjson.dumps(body)) as response:
            return await self._json(response)

    async def get_json(self, path: str) -> dict[str, Any]:
        """GET from the system itself. Raises `CallFailed`."""
        async with self._session.get(f"{next(self._urls)}{path}") as response:
            return await self._json(response)

    async def _json(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        data = await response.read()
        if response.status >= 400:
            raise CallFailed(f"{response.url.path}: {response.status} {data[:300]!r}")
        return dict(orjson.loads(data))

    async def events(self, path: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The server-sent events of `path`, (name, data), until the server ends them."""
        async with self._session.get(f"{next(self._urls)}{path}") as response:
            name = "message"
            async for line in _lines(response.content):
                if line.startswith(b"event: "):
                    name = line[7:].decode()
                elif line.startswith(b"data: "):
                    yield name, orjson.loads(line[6:])

    async def _attempt(self, payload: bytes, streamed: bool) -> tuple[int, str, float | None, str | None]:
        """(status, text or error, first token's time, cache header); a broken connection counts as 503."""
        url = f"{next(self._urls)}/v1/chat/completions"
        try:
            async with self._session.post(
                url, data=payload, headers={"content-type": "application/json"}
            ) as response:
                cache = response.headers.get("X-Helium-Cache")
                if response.status != 200:
                    return response.status, await response.text(), None, cache
                if not streamed:
                    answer = orjson.loads(await response.read())
                    return 200, answer["choices"][0]["message"]["content"] or "", None, cache
                text, first = await self._read_stream(response)
                return 200, text, first, cache
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return 503, f"{type(error).__name__}: {error}", None, None

    async def _read_stream(self, response: aiohttp.ClientResponse) -> tuple[str, float | None]:
        parts: list[str] = []
        first: float | None = None
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = orjson.loads(line[6:])
            if "error" in event:
                raise aiohttp.ClientPayloadError(str(event["error"]))
            for choice in event["choices"]:
                text = choice["delta"].get("content")
                if text:
                    if first is None:
                        first = time.perf_counter() - self._origin
                    parts.append(text)
        return "".join(parts), first


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length (aiohttp's own iteration refuses long ones)."""
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
