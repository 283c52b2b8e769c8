"""``/v1/responses``, with retrieval, continuation (`previous_response_id`), background runs and cancellation."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from .core import EmbeddedEngine, Generation
from .generate import Reply
from .http import ApiError, Call, integer, relay, supervise, whole
from .openai import Prompt, chat_prompt, pin_reply, request_id, submit

_KEPT = 1024


@dataclass(slots=True)
class Stored:
    """A response that can be fetched: `turns` is the conversation it answered, its reply added when complete."""

    response: dict[str, Any]
    turns: list[Any]
    generation: Generation
    task: asyncio.Task[None] | None = None


class Responses:
    """The route's handlers and the responses they remember."""

    def __init__(self) -> None:
        # -- all mutable state: response id -> what is kept of it, oldest first; at most _KEPT ------------------
        self._stored: OrderedDict[str, Stored] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Responses {len(self._stored)} stored>"

    async def create(self, engine: EmbeddedEngine, call: Call) -> None:
        """``POST /v1/responses``."""
        body = call.body
        turns = self._turns(body)
        prompt = _prompt(engine, body, turns)
        max_tokens = integer(body, "max_output_tokens", 0, 1) or None
        background = bool(body.get("background"))
        stream = bool(body.get("stream")) and not background
        id = f"resp_{request_id(call)}"
        generation = submit(engine, call, id, [prompt], max_tokens=max_tokens, stream=stream)[0]
        stored = Stored(_skeleton(engine, id, body), turns, generation)
        if body.get("store", True) is not False:
            self._keep(engine, id, stored)
        if background:
            stored.response["status"] = "queued"
            stored.task = asyncio.create_task(self._finish(stored))
            await call.json(stored.response)
        elif stream:
            await supervise(engine, call, [generation], self._stream(call, stored))
        else:
            await supervise(engine, call, [generation], self._whole(call, stored))

    async def fetch(self, engine: EmbeddedEngine, call: Call) -> None:
        """``GET /v1/responses/{id}``."""
        await call.json(self._find(call).response)

    async def cancel(self, engine: EmbeddedEngine, call: Call) -> None:
        """``POST /v1/responses/{id}/cancel``: only what runs in the background can be cancelled."""
        stored = self._find(call)
        if stored.task is None:
            raise ApiError(400, "Cannot cancel a synchronous response.", param="response_id")
        if not stored.generation.finished:
            engine.abort(stored.generation)
            await stored.task
        await call.json(stored.response)

    def _find(self, call: Call) -> Stored:
        id = call.scope["path_params"]["id"]
        stored = self._stored.get(id)
        if stored is None:
            raise ApiError(404, f"Response with id '{id}' not found.", param="response_id")
        return stored

    def _keep(self, engine: EmbeddedEngine, id: str, stored: Stored) -> None:
        self._stored[id] = stored
        if len(self._stored) > _KEPT:
            _, old = self._stored.popitem(last=False)
            if old.task is not None:
                engine.abort(old.generation)

    def _turns(self, body: Mapping[str, Any]) -> list[Any]:
        """The conversation so far in chat form, the instructions not included."""
        turns: list[Any] = []
        previous = body.get("previous_response_id")
        if previous is not None:
            stored = self._stored.get(previous)
            if stored is None:
                raise ApiError(404, f"Response with id '{previous}' not found.", param="response_id")
            turns += stored.turns
        given = body.get("input")
        if isinstance(given, str):
            return [*turns, {"role": "user", "content": given}]
        if not isinstance(given, list):
            raise ApiError(400, "input must be text or a list of items.", param="input")
        for item in given:
            kind = item.get("type", "message") if isinstance(item, dict) else None
            if kind == "message":
                turns.append(item)
            elif kind == "function_call":
                turns.append({"role": "assistant", "tool_calls": [{"function": item}]})
            elif kind == "function_call_output":
                turns.append({"role": "tool", "content": item.get("output")})
            elif kind != "reasoning":
                raise ApiError(400, f"input holds an item of unknown type {kind!r}.", param="input")
        return turns

    async def _finish(self, stored: Stored) -> None:
        """Wait for the reply and complete the response."""
        await stored.generation.wait()
        response, generation, reply = stored.response, stored.generation, stored.generation.reply
        if not generation.complete:
            response["status"] = "cancelled"
            return
        response["output"] = _output(response["id"], reply)
        response["usage"] = _usage(generation)
        response["kv_transfer_params"] = pin_reply([generation])
        length = reply.finish_reason == "length"
        response["status"] = "incomplete" if length else "completed"
        response["incomplete_details"] = {"reason": "max_output_tokens"} if length else None
        calls = [{"function": {"name": c.name, "arguments": c.arguments}} for c in reply.tool_calls]
        content = None if calls else reply.text
        stored.turns = [*stored.turns, {"role": "assistant", "content": content, "tool_calls": calls}]

    async def _whole(self, call: Call, stored: Stored) -> None:
        await whole(stored.generation)
        await self._finish(stored)
        await call.json(stored.response)

    async def _stream(self, call: Call, stored: Stored) -> None:
        events = _Events()
        reply = stored.generation.reply
        await call.open_stream()
        await call.write(
            events("response.created", response=stored.response)
            + events("response.in_progress", response=stored.response)
        )
        item = _output(stored.response["id"], reply)[0]
        if reply.tool_calls:
            await stored.generation.wait()
            tail = b""
            for i, made in enumerate(_output(stored.response["id"], reply)):
                where = {"item_id": made["id"], "output_index": i}
                empty = {**made, "arguments": "", "status": "in_progress"}
                tail += events("response.output_item.added", output_index=i, item=empty)
                tail += events("response.function_call_arguments.delta", **where, delta=made["arguments"])
                tail += events(
                    "response.function_call_arguments.done",
                    **where,
                    arguments=made["arguments"],
                    name=made["name"],
                )
                tail += events("response.output_item.done", output_index=i, item=made)
        else:
            where = {"item_id": item["id"], "output_index": 0, "content_index": 0}
            empty = {**item, "content": [], "status": "in_progress"}
            blank = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            await call.write(
                events("response.output_item.added", output_index=0, item=empty)
                + events("response.content_part.added", **where, part=blank)
            )

            def progress(index: int, generation: Generation, start: int, stop: int) -> list[bytes]:
                return [
                    events("response.output_text.delta", **where, delta=piece, logprobs=[])
                    for piece in filter(None, reply.pieces[start:stop])
                ]

            await relay(call, [stored.generation], progress)
            tail = events("response.output_text.done", **where, text=reply.text, logprobs=[])
            tail += events("response.content_part.done", **where, part=item["content"][0])
            tail += events("response.output_item.done", output_index=0, item=item)
        await self._finish(stored)
        final = "response.incomplete" if reply.finish_reason == "length" else "response.completed"
        await call.close_stream(tail + events(final, response=stored.response))


class _Events:
    """Numbers the events of one stream."""

    def __init__(self) -> None:
        self._number = -1

    def __call__(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        data = orjson.dumps({"type": kind, "sequence_number": self._number, **fields})
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _prompt(engine: EmbeddedEngine, body: Mapping[str, Any], turns: list[Any]) -> Prompt:
    if body.get("instructions"):
        turns = [{"role": "system", "content": body["instructions"]}, *turns]
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise ApiError(400, "tools must be a list.", param="tools")
    functions = [{"type": "function", "function": t} for t in tools if isinstance(t, dict) and t.get("name")]
    form = (body.get("text") or {}).get("format") if isinstance(body.get("text"), dict) else None
    return chat_prompt(
        engine,
        {
            "messages": turns,
            "tools": functions,
            "tool_choice": body.get("tool_choice") if functions else None,
            "response_format": form,
        },
    )


def _skeleton(engine: EmbeddedEngine, id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": engine.config.model,
        "output": [],
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "temperature": body.get("temperature", 1.0),
        "top_p": body.get("top_p", 1.0),
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools") or [],
        "background": bool(body.get("background")),
        "max_output_tokens": body.get("max_output_tokens"),
        "previous_response_id": body.get("previous_response_id"),
        "incomplete_details": None,
        "usage": None,
    }


def _output(id: str, reply: Reply) -> list[dict[str, Any]]:
    key = id.removeprefix("resp_")
    if reply.tool_calls:
        return [
            {
                "id": f"fc_{key}_{i}",
                "type": "function_call",
                "call_id": f"call_{key}_{i}",
                "name": c.name,
                "arguments": c.arguments,
                "status": "completed",
            }
            for i, c in enumerate(reply.tool_calls)
        ]
    part: dict[str, Any] = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": None}
    return [{"id": f"msg_{key}", "type": "message", "role": "assistant", "status": "completed", "content": [part]}]


def _usage(generation: Generation) -> dict[str, Any]:
    prompt = generation.request.prompt_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": generation.request.cached_tokens},
        "output_tokens": generation.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + generation.generated,
    }
