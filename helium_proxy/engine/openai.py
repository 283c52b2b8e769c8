"""``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from .core import EmbeddedEngine, Generation
from .generate import Reply, Sampling, choose_tool, free_text, json_reply, seed_of, tool_call
from .http import DONE, DOWN, ApiError, Call, integer, relay, sampling, sse, supervise, token_list, usage, whole
from .text import render

_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in tokens, and what decides the kind of reply to it."""

    tokens: array[int]
    tools: tuple[Any, ...] = ()
    tool_choice: Any = "none"
    answered: bool = False
    """The last message is a tool's result."""
    schema: Any = False
    """A JSON schema the reply must satisfy; None: any object; False: free text."""


def chat_prompt(engine: EmbeddedEngine, body: Mapping[str, Any]) -> Prompt:
    """The prompt of a chat request."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message.", param="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"messages[{i}] must be an object with a role.", param="messages")
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise ApiError(400, "tools must be a list.", param="tools")
    choice = body.get("tool_choice") or ("auto" if tools else "none")
    if not tools and (choice == "required" or isinstance(choice, dict)):
        raise ApiError(400, "When using `tool_choice`, `tools` must be set.", param="tool_choice")
    add = body.get("add_generation_prompt", True) is not False
    # Tools are in the prompt under "none" as well: vLLM's default (`--exclude-tools-when-tool-choice-none` is off).
    tokens = render(engine.tokenizer, messages, tools, add_generation_prompt=add)
    answered = messages[-1]["role"] == "tool"
    return Prompt(tokens, tuple(tools), choice, answered, response_schema(body.get("response_format")))


def response_schema(form: Any) -> Any:
    """The JSON schema a `response_format` asks for; None: any object; False: free text."""
    if not isinstance(form, Mapping) or form.get("type") in (None, "text"):
        return False
    if form["type"] == "json_object":
        return None
    if form["type"] == "json_schema":
        nested = form.get("json_schema")
        schema = nested.get("schema") if isinstance(nested, Mapping) else form.get("schema")
        if isinstance(schema, Mapping):
            return schema
    raise ApiError(400, "response_format must be text, json_object or a json_schema.", param="response_format")


def reply_to(engine: EmbeddedEngine, prompt: Prompt, params: Sampling, choice: int) -> Reply:
    """The reply to `prompt`; further choices (n > 1) differ from the first."""
    seed = seed_of(prompt.tokens, engine.config.seed, params.salt, choice)
    function = choose_tool(prompt.tools, prompt.tool_choice, seed, answered=prompt.answered)
    if function is not None:
        reply = tool_call(engine.tokenizer, function, seed, params)
        if reply.tool_calls and isinstance(prompt.tool_choice, Mapping):
            return replace(reply, finish_reason="stop")  # vLLM's, and OpenAI's, for a call that was forced by name
        return reply
    if prompt.schema is not False:
        return json_reply(engine.tokenizer, prompt.schema, seed, params)
    return free_text(engine.tokenizer, seed, params)


def submit(
    engine: EmbeddedEngine,
    call: Call,
    id: str,
    prompts: list[Prompt],
    *,
    max_tokens: int | None,
    n: int = 1,
    stream: bool = False,
) -> list[Generation]:
    """Queue `n` generations for each prompt; all or none."""
    body = call.body
    header = call.header(b"x-vllm-priority")
    priority = integer(body, "priority", int(header) if header and header.lstrip("-").isdigit() else 0)
    transfer = body.get("kv_transfer_params")
    directive = transfer.get("helium") if isinstance(transfer, dict) else None
    salt = body.get("cache_salt") or ""
    if not isinstance(salt, str):
        raise ApiError(400, "cache_salt must be a string.", param="cache_salt")
    ready = []
    for prompt in prompts:
        params = sampling(body, len(prompt.tokens), engine.config.context, max_tokens)
        ready += [(prompt, reply_to(engine, prompt, params, i)) for i in range(n)]
    if not engine.alive:
        raise ApiError(500, DOWN)
    return [
        engine.submit(
            f"{id}-{next(_ids)}",
            prompt.tokens,
            reply,
            priority=priority,
            salt=salt,
            directive=directive,
            stream=stream,
            read_cache=body.get("prompt_logprobs") is None,
        )
        for prompt, reply in ready
    ]


def request_id(call: Call) -> str:
    """The client's ``X-Request-Id``, or a new id."""
    return call.header(b"x-request-id") or f"{time.time_ns():x}{next(_ids):08x}"


def pin_reply(generations: list[Generation]) -> dict[str, Any] | None:
    """``kv_transfer_params`` of the response: what became of the pin directive."""
    reply = generations[0].request.pin_reply
    return None if reply is None else {"helium": reply}


# -- log probabilities: well-formed, and a function of the token alone -----------------------------------------


def _logprob(token: int) -> float:
    return -(token % 4093) / 1024


def chat_logprobs(reply: Reply, start: int, stop: int, top: int) -> list[dict[str, Any]]:
    def entry(piece: str, token: int, below: float = 0.0) -> dict[str, Any]:
        return {"token": piece, "logprob": _logprob(token) - below, "bytes": list(piece.encode())}

    return [
        {
            **entry(reply.pieces[i], reply.tokens[i]),
            "top_logprobs": [entry(reply.pieces[i] + "'" * k, reply.tokens[i], float(k)) for k in range(top)],
        }
        for i in range(start, stop)
    ]


def completion_logprobs(reply: Reply, start: int, stop: int, top: int) -> dict[str, Any]:
    lengths = [len(piece) for piece in reply.pieces[:stop]]
    offsets = list(itertools.accumulate(lengths, initial=0))
    return {
        "text_offset": offsets[start:stop],
        "token_logprobs": [_logprob(t) for t in reply.tokens[start:stop]],
        "tokens": list(reply.pieces[start:stop]),
        "top_logprobs": [
            {reply.pieces[i] + "'" * k: _logprob(reply.tokens[i]) - k for k in range(max(1, top))}
            for i in range(start, stop)
        ],
    }


# -- chat -------------------------------------------------------------------------------------------------------


async def chat(engine: EmbeddedEngine, call: Call) -> None:
    body = call.body
    limit = body.get("max_completion_tokens")
    name = "max_tokens" if limit is None else "max_completion_tokens"
    max_tokens = integer(body, name, 0, 1) or None
    prompt = chat_prompt(engine, body)
    top = integer(body, "top_logprobs", 0, 0, 20) if body.get("logprobs") else -1
    n = integer(body, "n", 1, 1, 128)
    stream = bool(body.get("stream"))
    id = f"chatcmpl-{request_id(call)}"
    generations = submit(engine, call, id, [prompt], max_tokens=max_tokens, n=n, stream=stream)
    answer = _chat_stream if stream else _chat_whole
    await supervise(engine, call, generations, answer(engine, call, id, generations, top))


async def _chat_whole(engine: EmbeddedEngine, call: Call, id: str, generations: list[Generation], top: int) -> None:
    choices = []
    for i, generation in enumerate(generations):
        reply = await whole(generation)
        choices.append(
            {
                "index": i,
                "message": {
                    "role": "assistant",
                    "content": None if reply.tool_calls else reply.text,
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "tool_calls": _tool_calls(id, reply),
                    "reasoning": None,
                },
                "logprobs": {"content": chat_logprobs(reply, 0, len(reply.tokens), top)} if top >= 0 else None,
                "finish_reason": reply.finish_reason,
                "stop_reason": reply.stop_reason,
                "token_ids": None,
            }
        )
    await call.json(
        {
            "id": id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": engine.config.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage(generations, len(generations)),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "kv_transfer_params": pin_reply(generations),
        }
    )


def _tool_calls(id: str, reply: Reply) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{id.removeprefix('chatcmpl-')}_{i}",
            "type": "function",
            "function": {"name": tool.name, "arguments": tool.arguments},
        }
        for i, tool in enumerate(reply.tool_calls)
    ]


async def _chat_stream(engine: EmbeddedEngine, call: Call, id: str, generations: list[Generation], top: int) -> None:
    head = {
        "id": id,
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": engine.config.model,
    }
    prefix = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reply: Reply | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if reply is not None:
            choice["finish_reason"] = reply.finish_reason
            choice["stop_reason"] = reply.stop_reason
        return prefix + orjson.dumps(choice) + b"]}\n\n"

    def progress(index: int, generation: Generation, start: int, stop: int) -> list[bytes]:
        reply = generation.reply
        last = len(reply.tokens) - 1
        out = []
        for i in range(start, stop):
            if reply.tool_calls:
                delta: dict[str, Any] = {}
                if i == last:
                    delta["tool_calls"] = [{"index": k, **c} for k, c in enumerate(_tool_calls(id, reply))]
                    out.append(chunk(index, delta))
                    out.append(chunk(index, {"content": ""}, None, reply))
                continue
            logprobs = {"content": chat_logprobs(reply, i, i + 1, top)} if top >= 0 else None
            out.append(chunk(index, {"content": reply.pieces[i]}, logprobs, reply if i == last else None))
        return out

    await call.open_stream()
    await call.write(b"".join(chunk(i, {"role": "assistant", "content": ""}) for i in range(len(generations))))
    await relay(call, generations, progress)
    options = call.body.get("stream_options")
    tail = b""
    if isinstance(options, Mapping) and options.get("include_usage"):
        tail = sse({**head, "choices": [], "usage": usage(generations, len(generations))})
    await call.close_stream(tail + DONE)


# -- completions ------------------------------------------------------------------------------------------------


async def completions(engine: EmbeddedEngine, call: Call) -> None:
    body = call.body
    prompts = [Prompt(p, schema=response_schema(body.get("response_format"))) for p in _prompts(engine, body)]
    max_tokens = integer(body, "max_tokens", 16, 1)
    n = integer(body, "n", 1, 1, 128)
    top = integer(body, "logprobs", -1, 0, 20)
    stream = bool(body.get("stream"))
    id = f"cmpl-{request_id(call)}"
    generations = submit(engine, call, id, prompts, max_tokens=max_tokens, n=n, stream=stream)
    answer = _completion_stream if stream else _completion_whole
    await supervise(engine, call, generations, answer(engine, call, id, generations, top))


def _prompts(engine: EmbeddedEngine, body: dict[str, Any]) -> list[array[int]]:
    value = body.get("prompt")
    tokens = token_list(value)
    if tokens is not None:
        return [tokens]
    out = []
    for item in value if isinstance(value, list) else [value]:
        tokens = engine.tokenizer.encode(item) if isinstance(item, str) else token_list(item)
        if not tokens:
            raise ApiError(400, "prompt must be text or token ids, or a list of either.", param="prompt")
        out.append(tokens)
    if not out:
        raise ApiError(400, "prompt must not be empty.", param="prompt")
    return out


async def _completion_whole(
    engine: EmbeddedEngine, call: Call, id: str, generations: list[Generation], top: int
) -> None:
    choices = []
    for i, generation in enumerate(generations):
        reply = await whole(generation)
        choices.append(
            {
                "index": i,
                "text": reply.text,
                "logprobs": completion_logprobs(reply, 0, len(reply.tokens), top) if top >= 0 else None,
                "finish_reason": reply.finish_reason,
                "stop_reason": reply.stop_reason,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
            }
        )
    await call.json(
        {
            "id": id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": engine.config.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage(generations, integer(call.body, "n", 1)),
            "kv_transfer_params": pin_reply(generations),
        }
    )


async def _completion_stream(
    engine: EmbeddedEngine, call: Call, id: str, generations: list[Generation], top: int
) -> None:
    head = {"id": id, "object": "text_completion", "created": int(time.time()), "model": engine.config.model}

    def progress(index: int, generation: Generation, start: int, stop: int) -> list[bytes]:
        reply = generation.reply
        out = []
        for i in range(start, stop):
            last = i == len(reply.tokens) - 1
            choice = {
                "index": index,
                "text": reply.pieces[i],
                "logprobs": completion_logprobs(reply, i, i + 1, top) if top >= 0 else None,
                "finish_reason": reply.finish_reason if last else None,
                "stop_reason": reply.stop_reason if last else None,
            }
            out.append(sse({**head, "choices": [choice]}))
        return out

    await call.open_stream()
    await relay(call, generations, progress)
    options = call.body.get("stream_options")
    tail = b""
    if isinstance(options, Mapping) and options.get("include_usage"):
        tail = sse({**head, "choices": [], "usage": usage(generations, integer(call.body, "n", 1))})
    await call.close_stream(tail + DONE)
