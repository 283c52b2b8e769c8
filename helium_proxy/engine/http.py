"""What the engine's routes share: reading a request, vLLM's error form, waiting with an eye on the client."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from .core import EmbeddedEngine, Generation
from .generate import Reply, Sampling

_TYPES = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError", 503: "ServiceUnavailableError"}


class ApiError(Exception):
    """An error in vLLM's form: ``{"error": {"message", "type", "param", "code"}}``."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.status},
        }


class Aborted(Exception):
    """The client has gone, or a fault ends the connection: nobody reads what would follow."""


class Call:
    """One HTTP request: its body once read, its client, and how to answer it."""

    __slots__ = ("_receive", "_send", "body", "fault", "fault_after", "scope", "started")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.body: dict[str, Any] = {}
        self.started = False
        self.fault: str | None = None  # "die" or "stream_error": how this call is to end
        self.fault_after = 0  # after so many tokens of a stream

    def header(self, name: bytes) -> str | None:
        for key, value in self.scope["headers"]:
            if key == name:
                return str(value.decode("latin-1"))
        return None

    async def read(self) -> None:
        """Read and parse the body, a JSON object."""
        chunks = []
        more = True
        while more:
            message: Message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Aborted
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        raw = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        try:
            body = orjson.loads(raw or b"{}")
        except orjson.JSONDecodeError as error:
            raise ApiError(400, f"JSON decode error: {error}") from None
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        self.body = body

    async def json(self, payload: Any, status: int = 200) -> None:
        await self.raw(orjson.dumps(payload), b"application/json", status)

    async def raw(self, body: bytes, content_type: bytes, status: int = 200) -> None:
        self.started = True
        headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        if self.fault is not None and status == 200:
            await self._send({"type": "http.response.body", "body": body[:-1], "more_body": True})
            raise Aborted
        await self._send({"type": "http.response.body", "body": body})

    async def open_stream(self) -> None:
        self.started = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close_stream(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data})

    async def suffer(self, tokens: int) -> None:
        """Carry out the fault ordered for this stream, once it has sent `tokens`."""
        if self.fault is not None and tokens >= self.fault_after:
            if self.fault == "stream_error":
                await self.close_stream(sse(ApiError(500, "a fault was ordered").body()) + DONE)
            raise Aborted

    async def gone(self) -> None:
        """Return when the client has disconnected; the body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def supervise(
    engine: EmbeddedEngine, call: Call, generations: Sequence[Generation], work: Awaitable[None]
) -> None:
    """Run `work`, which answers `call` from `generations`; abort them if the client goes or `work` fails."""
    task = asyncio.ensure_future(work)
    try:
        for _ in range(3):  # an instant engine is done by then, and a watcher would be wasted
            await asyncio.sleep(0)
        if not task.done():
            watcher = asyncio.create_task(call.gone())
            try:
                await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
            finally:
                watcher.cancel()
        if not task.done():
            raise Aborted
        task.result()
    finally:
        if not task.done():
            task.cancel()
        for generation in generations:
            engine.abort(generation)


Progress = Callable[[int, Generation, int, int], list[bytes]]
"""(index, generation, start, stop) -> the chunks that carry its tokens start to stop."""


async def relay(call: Call, generations: list[Generation], progress: Progress) -> None:
    """Write what `progress(index, generation, start, stop)` makes of each generation's tokens as they come.

    Choices of one request advance in the same steps, so one after the other is waited for.
    """
    seen = [0] * len(generations)
    open_ = list(range(len(generations)))
    while open_:
        await generations[open_[0]].wait(seen[open_[0]])
        out: list[bytes] = []
        for i in list(open_):
            generation = generations[i]
            if generation.generated > seen[i]:
                out += progress(i, generation, seen[i], generation.generated)
                seen[i] = generation.generated
            if generation.finished:
                open_.remove(i)
                if not generation.complete:
                    await call.close_stream(b"".join(out) + sse(ApiError(500, DOWN).body()) + DONE)
                    raise Aborted
        if out:
            await call.write(b"".join(out))
        await call.suffer(seen[0])


async def whole(generation: Generation) -> Reply:
    """The reply, when all of it has come."""
    await generation.wait()
    if not generation.complete:
        raise ApiError(500, DOWN)
    return generation.reply


def sse(payload: Any) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


DONE = b"data: [DONE]\n\n"
DOWN = "the engine is down"


def usage(generations: Sequence[Generation], n: int = 1) -> dict[str, Any]:
    """Token counts of a response, whose prompts have `n` generations each."""
    prompt = sum(g.request.prompt_tokens for g in generations[::n])
    completion = sum(g.generated for g in generations)
    cached = sum(g.request.cached_tokens for g in generations[::n])
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


# -- reading fields ---------------------------------------------------------------------------------------------


def integer(body: dict[str, Any], name: str, default: int, low: int | None = None, high: int | None = None) -> int:
    """A whole number of the body, or `default` if absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError(400, f"{name} must be an integer, got {value!r}.", param=name)
    if (low is not None and value < low) or (high is not None and value > high):
        bound = f"at least {low}" if low is not None and value < low else f"at most {high}"
        raise ApiError(400, f"{name} must be {bound}, got {value}.", param=name)
    return value


def sampling(body: dict[str, Any], prompt_tokens: int, context: int, max_tokens: int | None) -> Sampling:
    """The sampling parameters of `body`; `max_tokens` (None: as many as fit) is cut to the context."""
    if prompt_tokens >= context:
        raise ApiError(
            400,
            f"This model's maximum context length is {context} tokens. However, your prompt contains "
            f"{prompt_tokens} input tokens, which exceeds this limit even without any output tokens. "
            f"Please reduce the length of the input prompt.",
            param="input_tokens",
        )
    room = context - prompt_tokens
    most = room if max_tokens is None else min(max_tokens, room)
    least = integer(body, "min_tokens", 0, 0)
    if max_tokens is not None and least > max_tokens:
        raise ApiError(400, f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {least}.")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise ApiError(400, "stop must be a string or a list of strings.", param="stop")
    temperature = body.get("temperature")
    if temperature is not None and (isinstance(temperature, bool) or not isinstance(temperature, int | float)):
        raise ApiError(400, f"temperature must be a number, got {temperature!r}.", param="temperature")
    if temperature is not None and temperature < 0:
        raise ApiError(400, f"temperature must be non-negative, got {temperature}.", param="temperature")
    seed = integer(body, "seed", -1)
    return Sampling(
        max_tokens=most,
        min_tokens=least,
        ignore_eos=bool(body.get("ignore_eos")),
        stop=tuple(stops),
        include_stop=bool(body.get("include_stop_str_in_output")),
        salt=f"{seed}" if seed >= 0 and temperature != 0 else "",
    )


def token_list(value: Any) -> array[int] | None:
    """A prompt given as token ids; None if `value` is not one."""
    if not isinstance(value, list) or not value or not all(type(t) is int for t in value):
        return None
    try:
        return array("I", value)
    except OverflowError:
        raise ApiError(400, "token ids must be between 0 and 4294967295.", param="prompt") from None
