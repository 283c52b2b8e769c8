"""``/v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's form, as vLLM serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from .core import EmbeddedEngine, Generation
from .generate import Reply
from .http import ApiError, Call, integer, relay, supervise, whole
from .openai import Prompt, chat_prompt, pin_reply, request_id, submit
from .text import content_text

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _messages(body: Mapping[str, Any]) -> list[Any]:
    """The conversation in OpenAI's form."""
    out: list[Any] = []
    if body.get("system"):
        out.append({"role": "system", "content": content_text(body["system"])})
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            out.append(message)
            continue
        rest, calls = [], []
        for block in content:
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "tool_use":
                arguments = orjson.dumps(block.get("input") or {}).decode()
                calls.append({"function": {"name": block.get("name"), "arguments": arguments}})
            elif kind == "tool_result":
                out.append({"role": "tool", "content": content_text(block.get("content"))})
            else:
                rest.append(block)
        if rest or calls:
            out.append({"role": message.get("role"), "content": rest, "tool_calls": calls})
    return out


def _prompt(engine: EmbeddedEngine, body: Mapping[str, Any]) -> Prompt:
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise ApiError(400, "tools must be a list of objects.", param="tools")
    functions = [
        {
            "type": "function",
            "function": {
                "name": t.get("name"),
                "description": t.get("description"),
                "parameters": t.get("input_schema"),
            },
        }
        for t in tools
    ]
    choice = body.get("tool_choice") or {}
    kind = choice.get("type", "auto") if isinstance(choice, dict) else "auto"
    wanted: Any = {"name": choice.get("name")} if kind == "tool" else _CHOICES.get(kind, "auto")
    return chat_prompt(
        engine, {"messages": _messages(body), "tools": functions, "tool_choice": wanted if tools else None}
    )


async def count_tokens(engine: EmbeddedEngine, call: Call) -> None:
    count = len(_prompt(engine, call.body).tokens)
    await call.json({"input_tokens": count, "context_management": {"original_input_tokens": count}})


async def messages(engine: EmbeddedEngine, call: Call) -> None:
    body = call.body
    if body.get("max_tokens") is None:
        raise ApiError(400, "max_tokens: Field required", param="max_tokens")
    max_tokens = integer(body, "max_tokens", 1, 1)
    body["stop"] = body.pop("stop_sequences", None)
    prompt = _prompt(engine, body)
    stream = bool(body.get("stream"))
    id = f"chatcmpl-{request_id(call)}"
    generations = submit(engine, call, id, [prompt], max_tokens=max_tokens, stream=stream)
    answer = _stream if stream else _whole
    await supervise(engine, call, generations, answer(engine, call, id, generations[0]))


def _usage(generation: Generation, output: int) -> dict[str, Any]:
    cached = generation.request.cached_tokens
    return {
        "input_tokens": generation.request.prompt_tokens - cached,
        "output_tokens": output,
        "cache_read_input_tokens": cached,
    }


def _blocks(id: str, reply: Reply) -> list[dict[str, Any]]:
    if reply.tool_calls:
        return [
            {"type": "tool_use", "id": f"call_{id}_{i}", "name": c.name, "input": orjson.loads(c.arguments)}
            for i, c in enumerate(reply.tool_calls)
        ]
    return [{"type": "text", "text": reply.text}]


def _stop(reply: Reply) -> tuple[str, str | None]:
    if reply.finish_reason == "length":
        return "max_tokens", None
    if reply.tool_calls:
        return "tool_use", None
    return ("end_turn", None) if reply.stop_reason is None else ("stop_sequence", reply.stop_reason)


async def _whole(engine: EmbeddedEngine, call: Call, id: str, generation: Generation) -> None:
    reply = await whole(generation)
    reason, sequence = _stop(reply)
    await call.json(
        {
            "id": id,
            "type": "message",
            "role": "assistant",
            "content": _blocks(id, reply),
            "model": engine.config.model,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(generation, generation.generated),
            "kv_transfer_params": pin_reply([generation]),
        }
    )


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


async def _stream(engine: EmbeddedEngine, call: Call, id: str, generation: Generation) -> None:
    reply = generation.reply
    await call.open_stream()
    message: dict[str, Any] = {
        "id": id, "type": "message", "role": "assistant", "content": [], "model": engine.config.model,
        "stop_reason": None, "stop_sequence": None, "usage": _usage(generation, 0),
    }  # fmt: skip
    started = False

    def progress(index: int, generation: Generation, start: int, stop: int) -> list[bytes]:
        nonlocal started
        out = []
        if not started:  # only now is it known what the cache held
            started = True
            out.append(_event("message_start", message={**message, "usage": _usage(generation, 0)}))
            if not reply.tool_calls:
                block = {"type": "text", "text": ""}
                out.append(_event("content_block_start", index=0, content_block=block))
        if not reply.tool_calls:
            for piece in filter(None, reply.pieces[start:stop]):
                delta = {"type": "text_delta", "text": piece}
                out.append(_event("content_block_delta", index=0, delta=delta))
        return out

    await relay(call, [generation], progress)
    tail = b""
    for i, block in enumerate(_blocks(id, reply)):
        if block["type"] == "tool_use":
            delta = {"type": "input_json_delta", "partial_json": orjson.dumps(block["input"]).decode()}
            tail += _event("content_block_start", index=i, content_block={**block, "input": {}})
            tail += _event("content_block_delta", index=i, delta=delta)
        tail += _event("content_block_stop", index=i)
    reason, sequence = _stop(reply)
    tail += _event(
        "message_delta",
        delta={"stop_reason": reason, "stop_sequence": sequence},
        usage=_usage(generation, generation.generated),
    )
    await call.close_stream(tail + _event("message_stop"))
