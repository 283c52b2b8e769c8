"""A kept answer told again: as JSON or as a stream, whichever is asked, whichever it was.

A replay has an id and a time of its own; text, tool calls, log probabilities, usage and finish reason are the
original's. A stream replays in as few events as its protocol allows (there is nothing to wait for), and ends as the
live one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from helium_proxy.reuse.entry import Entry
from helium_proxy.reuse.routes import Family, family
from helium_proxy.reuse.sse import DONE, data_event, named_event

ECHOED = ("metadata", "user")
"""Fields of a request that /v1/responses repeats in its answer and that are not part of the key."""


def as_json(entry: Entry, new_id: str, now: float, request: Mapping[str, Any] | None = None) -> bytes:
    """The answer as one JSON body. `now` is Unix time in seconds; `request` is the asker's body, if fields of it are
    to be echoed as its own."""
    own = {name: new_id if name == "id" else int(now) for name in entry.own}
    if request is not None and family(entry.route) is Family.RESPONSES:
        answer = orjson.loads(entry.body)
        answer.update({name: request.get(name) for name in ECHOED if name in answer})
        return orjson.dumps({**own, **answer})
    if not own:
        return entry.body
    if entry.body == b"{}":
        return orjson.dumps(own)
    return orjson.dumps(own)[:-1] + b"," + entry.body[1:]


def as_sse(
    entry: Entry,
    new_id: str,
    now: float,
    include_usage: bool = False,
    request: Mapping[str, Any] | None = None,
) -> list[bytes]:
    """The answer as the events of a stream. `include_usage` is ``stream_options.include_usage`` (chat, completions;
    the other families always carry their usage). Raises ValueError for a route that has no streams."""
    return list(events(orjson.loads(as_json(entry, new_id, now, request)), entry.route, include_usage))


def events(answer: dict[str, Any], route: str, include_usage: bool) -> Iterator[bytes]:
    """The stream equivalent to the non-stream `answer` of `route`."""
    match family(route):
        case Family.CHAT:
            yield from _choice_events(answer, "chat.completion.chunk", _chat_deltas, include_usage)
        case Family.COMPLETIONS:
            yield from _choice_events(answer, "text_completion", _text_deltas, include_usage)
        case Family.RESPONSES:
            for number, event in enumerate(_response_events(answer)):
                yield named_event({**event, "sequence_number": number})
        case Family.MESSAGES:
            yield from map(named_event, _message_events(answer))
        case _:
            raise ValueError(f"{route} has no streams")


# -- chat and completions


def _choice_events(answer: dict[str, Any], kind: str, deltas: Any, include_usage: bool) -> Iterator[bytes]:
    head = {"id": answer.get("id"), "object": kind, "created": answer.get("created"), "model": answer.get("model")}
    extra = {k: v for k, v in answer.items() if v is not None and k not in head and k not in ("choices", "usage")}
    for choice in answer["choices"]:
        for delta in deltas(choice):
            yield data_event({**head, **extra, "choices": [{"index": choice["index"], **delta}]})
            extra = {}  # what concerns the whole answer goes with its first chunk
    if include_usage:
        yield data_event({**head, "choices": [], "usage": answer.get("usage")})
    yield DONE


_ENDS = ("finish_reason", "stop_reason")


def _chat_deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    message = choice["message"]
    end = {name: choice.get(name) for name in _ENDS if name in choice}
    other = {k: v for k, v in choice.items() if v is not None and k not in (*_ENDS, "index", "message")}
    yield {"delta": {"role": message.get("role", "assistant"), "content": ""}, "finish_reason": None}
    for name, value in message.items():
        if isinstance(value, str) and value and name not in ("role", "content"):  # reasoning before content
            yield {"delta": {name: value}, "finish_reason": None}
    content = message.get("content")
    if content or other:
        yield {"delta": {"content": content} if content else {}, **other, "finish_reason": None}
    for index, call in enumerate(message.get("tool_calls") or ()):
        yield {"delta": {"tool_calls": [{"index": index, **call}]}, "finish_reason": None}
    yield {"delta": {}, **end}


def _text_deltas(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {k: v for k, v in choice.items() if k != "index"}


# -- responses


def _response_events(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    started = {**answer, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield {"type": "response.created", "response": started}
    yield {"type": "response.in_progress", "response": started}
    for index, item in enumerate(answer.get("output") or ()):
        at = {"item_id": item.get("id") or "", "output_index": index}
        blank = {**item, "status": "in_progress"}
        match item.get("type"):
            case "message" | "reasoning":
                blank["content"] = []
            case "function_call":
                blank["arguments"] = ""
        yield {"type": "response.output_item.added", "output_index": index, "item": blank}
        match item.get("type"):
            case "message":
                yield from _part_events(item.get("content"), at, _MESSAGE_PARTS)
            case "reasoning":
                yield from _part_events(item.get("content"), at, _REASONING_PARTS)
            case "function_call":
                whole, name = item.get("arguments") or "", item.get("name")
                kind = "response.function_call_arguments"
                yield {"type": f"{kind}.delta", **at, "delta": whole}
                yield {"type": f"{kind}.done", **at, "arguments": whole, "name": name}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    # As vLLM ends it, also where max_output_tokens cut it: openai-python takes nothing else for the end.
    yield {"type": "response.completed", "response": answer}


_MESSAGE_PARTS = {"output_text": ("output_text", "text"), "refusal": ("refusal", "refusal")}
_REASONING_PARTS = {"reasoning_text": ("reasoning_text", "text")}


def _part_events(
    parts: Iterable[dict[str, Any]] | None, at: dict[str, Any], kinds: Mapping[str, tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    for index, part in enumerate(parts or ()):
        here = {**at, "content_index": index}
        name, field = kinds.get(part.get("type", ""), ("", ""))
        yield {"type": "response.content_part.added", **here, "part": {**part, field: ""} if name else part}
        if name:
            text = part.get(field) or ""
            logprobs = {"logprobs": part.get("logprobs") or []} if name == "output_text" else {}
            yield {"type": f"response.{name}.delta", **here, "delta": text, **logprobs}
            yield {"type": f"response.{name}.done", **here, field: text, **logprobs}
        yield {"type": "response.content_part.done", **here, "part": part}


# -- messages


def _message_events(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    usage = answer.get("usage") or {}
    end = {name: answer.get(name) for name in ("stop_reason", "stop_sequence")}
    started = {**answer, "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": {**started, "usage": {**usage, "output_tokens": 0}}}
    for index, block in enumerate(answer.get("content") or ()):
        blank, deltas = _blank_and_deltas(block)
        yield {"type": "content_block_start", "index": index, "content_block": blank}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": end, "usage": usage}
    yield {"type": "message_stop"}


def _blank_and_deltas(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    match block.get("type"):
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": block.get("text") or ""}]
        case "thinking":
            deltas = [{"type": "thinking_delta", "thinking": block.get("thinking") or ""}]
            if block.get("signature"):
                deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return {**block, "thinking": "", "signature": ""}, deltas
        case "tool_use":
            arguments = orjson.dumps(block.get("input") or {}).decode()
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": arguments}]
        case _:
            return block, []
