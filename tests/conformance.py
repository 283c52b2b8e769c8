# ruff: noqa: E501 -- a table
"""Requests that must be answered alike by a worker and by the proxy in front of it.

`CASES` is the table. `ask` sends one, `Reply.normal` is what has to be equal: status, headers that matter, and the
body or the sequence of events, without ids and times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
from serving import CHAT, events

COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"


@dataclass(frozen=True)
class Case:
    """One request: `body` is sent as JSON, `raw` as it is."""

    name: str
    path: str
    body: Any = None
    method: str = "POST"
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    status: int | tuple[int, ...] = 200
    """What a generative engine answers (several: engines differ)."""

    def __str__(self) -> str:
        return self.name


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


_GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 5}
_CHAT = {**_GREEDY, "messages": _user("Name a colour.")}
_STREAM = {**_CHAT, "stream": True}
_COMPLETION = {**_GREEDY, "prompt": "Once upon a time"}
_RESPONSE = {"model": "demo", "temperature": 0, "max_output_tokens": 5, "input": "Name a colour."}
_MESSAGE = {**_GREEDY, "messages": _user("Name a colour.")}
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "schema": {
            "type": "object",
            "properties": {"good": {"type": "boolean"}},
            "required": ["good"],
            "additionalProperties": False,
        },
    },
}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather somewhere.",
            "parameters": {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]},
        },
    }
]
_NAMED = {"type": "function", "function": {"name": "weather"}}
_LOOP = [
    *_user("Is it warm?"),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"warm": true}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "It is."},
]
_TAGS = {"workflow": "conformance", "run": "r1", "node": "n", "parents": [], "priority": 3, "final": False}
_TAG_HEADERS = {"X-Helium-Workflow": "conformance", "X-Helium-Run": "r2", "baggage": "helium.node=b"}

CASES: tuple[Case, ...] = (
    # -- chat
    Case("chat", CHAT, _CHAT),
    Case("chat stream", CHAT, _STREAM),
    Case("chat stream with usage", CHAT, {**_STREAM, "stream_options": {"include_usage": True}}),
    Case("chat stream with usage refused", CHAT, {**_STREAM, "stream_options": {"include_usage": False}}),
    Case(
        "chat stream with usage in every chunk",
        CHAT,
        {**_STREAM, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    Case(
        "chat stream with continuous usage alone", CHAT, {**_STREAM, "stream_options": {"continuous_usage_stats": True}}
    ),
    Case("chat stream with null options", CHAT, {**_STREAM, "stream_options": None}),
    Case("chat stream with bad options", CHAT, {**_STREAM, "stream_options": "all"}, status=(200, 400)),
    Case("chat stream as a number", CHAT, {**_CHAT, "stream": 1}),
    Case("chat with a system prompt", CHAT, {**_CHAT, "messages": [{"role": "system", "content": "Be brief."}, *_user("Hi")]}),
    Case("chat with parts", CHAT, {**_CHAT, "messages": _user([{"type": "text", "text": "Na"}, {"type": "text", "text": "me"}])}),  # type: ignore[arg-type]
    Case("chat unicode", CHAT, {**_CHAT, "messages": _user("naïve 東京 🙂 \u202e \\ \" \x7f")}),
    Case("chat sampled with a seed", CHAT, {**_CHAT, "temperature": 0.8, "top_p": 0.9, "seed": 7}),
    Case("chat two choices", CHAT, {**_CHAT, "temperature": 0.8, "seed": 7, "n": 2}),
    Case("chat two choices streamed", CHAT, {**_STREAM, "temperature": 0.8, "seed": 7, "n": 2}),
    Case("chat logprobs", CHAT, {**_CHAT, "logprobs": True, "top_logprobs": 3}),
    Case("chat logprobs streamed", CHAT, {**_STREAM, "logprobs": True, "top_logprobs": 2}),
    Case("chat stop", CHAT, {**_CHAT, "max_tokens": 40, "stop": ["e", "a"]}),
    Case("chat vendor fields", CHAT, {**_CHAT, "min_tokens": 4, "ignore_eos": True, "vllm_xargs": {"k": "v"}, "top_k": 5}),
    Case("chat priority", CHAT, {**_CHAT, "priority": 0}),
    Case("chat return token ids", CHAT, {**_CHAT, "return_token_ids": True}),
    Case("chat unknown fields", CHAT, {**_CHAT, "no_such_field": {"a": [1, None]}, "user": "u", "metadata": {"k": "v"}}),
    Case("chat tools", CHAT, {**_CHAT, "max_tokens": 24, "tools": _TOOLS}),
    Case("chat tools streamed", CHAT, {**_STREAM, "max_tokens": 24, "tools": _TOOLS}),
    Case("chat named tool", CHAT, {**_CHAT, "max_tokens": 24, "tools": _TOOLS, "tool_choice": _NAMED}),
    Case("chat named tool streamed", CHAT, {**_STREAM, "max_tokens": 24, "tools": _TOOLS, "tool_choice": _NAMED}),
    Case("chat tool required", CHAT, {**_CHAT, "max_tokens": 40, "tools": _TOOLS, "tool_choice": "required"}),
    Case("chat no tool", CHAT, {**_CHAT, "tools": _TOOLS, "tool_choice": "none"}),
    Case("chat tool's result", CHAT, {**_CHAT, "messages": _LOOP, "tools": _TOOLS}),
    Case("chat json schema", CHAT, {**_CHAT, "max_tokens": 30, "response_format": _SCHEMA}),
    Case("chat json schema streamed", CHAT, {**_STREAM, "max_tokens": 30, "response_format": _SCHEMA}),
    Case("chat tags in the body", CHAT, {**_CHAT, "helium": _TAGS}),
    Case("chat tags in the body, streamed", CHAT, {**_STREAM, "helium": _TAGS}),
    Case("chat tags in headers", CHAT, _CHAT, headers=_TAG_HEADERS),
    Case("chat bad tags", CHAT, {**_CHAT, "helium": {"run": 7.5, "parents": {}, "priority": "high"}}),
    Case("chat tags that are no object", CHAT, {**_CHAT, "helium": "yes"}),
    Case("chat request id", CHAT, _CHAT, headers={"X-Request-Id": "my-own-id.1"}),
    Case("chat odd request id", CHAT, _CHAT, headers={"X-Request-Id": "a b/{c}"}),
    Case("chat whitespace before the object", CHAT, raw=b" \r\n\t" + orjson.dumps(_STREAM)),
    Case("chat equal keys", CHAT, raw=orjson.dumps(_CHAT)[:-1] + b',"max_tokens":3}'),
    # -- completions
    Case("completion", COMPLETIONS, _COMPLETION),
    Case("completion streamed", COMPLETIONS, {**_COMPLETION, "stream": True}),
    Case(
        "completion streamed with usage",
        COMPLETIONS,
        {**_COMPLETION, "stream": True, "stream_options": {"include_usage": True}},
    ),
    Case("completion of token ids", COMPLETIONS, {**_COMPLETION, "prompt": [11, 12, 13, 14]}),
    Case("completion of several prompts", COMPLETIONS, {**_COMPLETION, "prompt": ["one", "two"]}),
    Case("completion of several prompts of ids", COMPLETIONS, {**_COMPLETION, "prompt": [[11, 12], [13]]}),
    Case("completion streamed, several prompts", COMPLETIONS, {**_COMPLETION, "prompt": ["one", "two"], "stream": True}),
    Case("completion with echo", COMPLETIONS, {**_COMPLETION, "echo": True}),
    Case("completion with logprobs", COMPLETIONS, {**_COMPLETION, "logprobs": 2}),
    Case("completion with echo and logprobs", COMPLETIONS, {**_COMPLETION, "echo": True, "logprobs": 1}),
    Case("completion, two choices", COMPLETIONS, {**_COMPLETION, "temperature": 0.7, "seed": 3, "n": 2}),
    Case("completion without a prompt", COMPLETIONS, {"model": "demo", "max_tokens": 2}, status=400),
    # -- responses
    Case("response", RESPONSES, _RESPONSE),
    Case("response streamed", RESPONSES, {**_RESPONSE, "stream": True}),
    Case("response with instructions", RESPONSES, {**_RESPONSE, "instructions": "Be brief.", "metadata": {"k": "v"}}),
    Case("response of items", RESPONSES, {**_RESPONSE, "input": _user("Name a colour.")}),
    Case("response unknown", f"{RESPONSES}/resp_none", method="GET", status=(400, 404)),
    Case("response cancel unknown", f"{RESPONSES}/resp_none/cancel", status=(400, 404)),
    Case("response of nothing", RESPONSES, {"model": "demo"}, status=400),
    Case("response after an unknown one", RESPONSES, {**_RESPONSE, "previous_response_id": "resp_none"}, status=(400, 404)),
    # -- messages
    Case("message", MESSAGES, _MESSAGE),
    Case("message streamed", MESSAGES, {**_MESSAGE, "stream": True}),
    Case("message with a system prompt", MESSAGES, {**_MESSAGE, "system": "Be brief."}),
    Case("message without messages", MESSAGES, {"model": "demo", "max_tokens": 5}, status=400),
    Case("message tokens counted", f"{MESSAGES}/count_tokens", {"model": "demo", "messages": _user("Hello")}),
    # -- pooling: a generative vLLM has no such routes, the embedded engine has
    Case("embeddings", "/v1/embeddings", {"model": "demo", "input": ["a", "b"]}, status=(200, 400, 404)),
    Case("rerank", "/v1/rerank", {"model": "demo", "query": "a", "documents": ["a", "b"]}, status=(200, 400, 404)),
    Case("score", "/v1/score", {"model": "demo", "text_1": "a", "text_2": "b"}, status=(200, 400, 404)),
    # -- tokens
    Case("tokenize a prompt", "/tokenize", {"model": "demo", "prompt": "Hello, world"}),
    Case("tokenize messages", "/tokenize", {"model": "demo", "messages": _user("Hello")}),
    Case("tokenize messages and tools", "/tokenize", {"model": "demo", "messages": _user("Hello"), "tools": _TOOLS}),
    Case("detokenize", "/detokenize", {"model": "demo", "tokens": [11, 12, 13]}),
    # -- models
    Case("models", "/v1/models", method="GET"),
    # -- bad requests
    Case("unknown model", CHAT, {**_CHAT, "model": "nobody"}, status=404),
    Case("unknown model streamed", CHAT, {**_STREAM, "model": "nobody"}, status=404),
    Case("no model", CHAT, {k: v for k, v in _CHAT.items() if k != "model"}, status=(200, 400)),
    Case("null model", CHAT, {**_CHAT, "model": None}, status=(200, 400)),
    Case("empty model", CHAT, {**_CHAT, "model": ""}, status=(200, 400, 404)),
    Case("model of another type", CHAT, {**_CHAT, "model": 7}, status=(400, 404)),
    Case("bad JSON", CHAT, raw=b'{"model": "demo", "messages": [', status=400),
    Case("not an object", CHAT, raw=b'["demo"]', status=400),
    Case("a bare string", CHAT, raw=b'"demo"', status=400),
    Case("empty body", CHAT, raw=b"", status=400),
    Case("invalid UTF-8", CHAT, raw=b'{"model": "demo", "messages": [{"role": "user", "content": "\xff\xfe"}]}', status=(200, 400)),
    Case("too long", CHAT, {**_CHAT, "messages": _user("word " * 9000)}, status=400),
    Case("too long streamed", CHAT, {**_STREAM, "messages": _user("word " * 9000)}, status=400),
    Case("no messages", CHAT, {"model": "demo"}, status=400),
    Case("empty messages", CHAT, {**_CHAT, "messages": []}, status=400),
    Case("messages of another type", CHAT, {**_CHAT, "messages": "hello"}, status=400),
    Case("message of another type", CHAT, {**_CHAT, "messages": [7]}, status=400),
    Case("temperature of another type", CHAT, {**_CHAT, "temperature": "hot"}, status=400),
    Case("temperature below zero", CHAT, {**_CHAT, "temperature": -1}, status=400),
    Case("max_tokens of another type", CHAT, {**_CHAT, "max_tokens": "many"}, status=400),
    Case("max_tokens zero", CHAT, {**_CHAT, "max_tokens": 0}, status=(200, 400)),
    Case("n zero", CHAT, {**_CHAT, "n": 0}, status=400),
    Case("tools of another type", CHAT, {**_CHAT, "tools": "weather"}, status=400),
    Case("tool_choice without tools", CHAT, {**_CHAT, "tool_choice": _NAMED}, status=400),
    Case("response_format unknown", CHAT, {**_CHAT, "response_format": {"type": "poem"}}, status=400),
    Case("a huge integer", CHAT, raw=orjson.dumps(_CHAT)[:-1] + b',"seed":' + b"9" * 30 + b"}", status=(200, 400)),
    Case("a huge integer and tags", CHAT, raw=orjson.dumps({**_CHAT, "helium": _TAGS})[:-1] + b',"extra":' + b"9" * 30 + b"}", status=(200, 400)),
    Case("an enormous max_tokens", CHAT, raw=b'{"model":"demo","messages":[{"role":"user","content":"a"}],"max_tokens":1' + b"0" * 400 + b"}", status=(200, 400)),
    Case("NaN", CHAT, raw=b'{"model":"demo","max_tokens":2,"messages":[{"role":"user","content":"a"}],"temperature":NaN}', status=(200, 400)),
    Case("deep nesting", CHAT, raw=b'{"model":"demo","max_tokens":2,"temperature":0,"messages":[{"role":"user","content":"a"}],"x":' + b"[" * 500 + b"]" * 500 + b"}", status=(200, 400)),
    Case("another content type", CHAT, raw=orjson.dumps(_CHAT), headers={"Content-Type": "text/plain"}, status=(200, 400, 415)),
    # -- routes and methods
    Case("unknown route", "/v1/no/such/route", {"model": "demo"}, status=404),
    Case("GET where POST is meant", CHAT, method="GET", status=405),
    Case("DELETE where POST is meant", CHAT, method="DELETE", status=405),
    Case("POST where GET is meant", "/v1/models", {}, status=405),
    Case("query string", CHAT + "?a=1&b=%2F", _CHAT),
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """An answer as it came."""

    status: int
    headers: httpx.Headers
    raw: bytes

    @property
    def stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def normal(self) -> Any:
        """What has to be equal."""
        body: Any
        if self.stream:
            body = events(self.raw)
        else:
            try:
                body = orjson.loads(self.raw)
            except orjson.JSONDecodeError:
                body = self.raw.decode("utf-8", "replace")
        return {
            "status": self.status,
            "content-type": self.headers.get("content-type"),
            "allow": self.headers.get("allow"),
            "body": _without_ids(body),
        }

    def gist(self) -> Any:
        """What a replay from the cache must keep: status, type, and all that was said, however it was cut."""
        normal = self.normal()
        if self.stream:
            said: dict[str, str] = {}
            rest: list[Any] = []
            for _, data in normal["body"]:
                if isinstance(data, str):
                    rest.append(data)
                    continue
                for where, text in _strings(data):
                    if where.rsplit("/", 1)[-1] in ("content", "text", "arguments", "delta", "partial_json"):
                        said[where] = said.get(where, "") + text
                    elif where.endswith(("finish_reason", "name", "stop_reason")):
                        rest.append((where, text))
                if isinstance(data, dict) and data.get("usage") and data.get("choices") == []:
                    rest.append(data["usage"])
            normal["body"] = {"said": said, "rest": rest}
        return _without_nulls(normal)

    def merged(self) -> Any:
        """As `gist`, with the kinds of events in their order and every field that occurs: for engines that put what
        came close together into one event, end their choices in any order, and cache what was asked before."""
        if not self.stream:
            return _without_cached(self.normal())
        kinds: list[Any] = []
        fields: set[str] = set()
        for name, data in self.normal()["body"]:
            kind = name or (data if isinstance(data, str) else data.get("object"))
            if not kinds or kinds[-1] != kind:
                kinds.append(kind)
            fields |= set(_paths(data))
        gist = self.gist()
        gist["body"]["rest"].sort(key=repr)
        return _without_cached({**gist, "kinds": kinds, "fields": sorted(fields)})


async def ask(client: httpx.AsyncClient, base: str, case: Case) -> Reply:
    headers = dict(case.headers)
    content = case.raw
    if content is None and case.body is not None:
        content = orjson.dumps(case.body)
    if content is not None:
        headers.setdefault("Content-Type", "application/json")
    response = await client.request(case.method, base + case.path, content=content, headers=headers)
    return Reply(response.status_code, response.headers, response.content)


def accepts(case: Case, status: int) -> bool:
    return status in ((case.status,) if isinstance(case.status, int) else case.status)


_ID = re.compile(r"(chatcmpl|cmpl|resp|msg|call|fc|rs|embd|score|rerank|modelperm)[-_].+")
_TIMES = frozenset({"created", "created_at", "completed_at"})
_HEX = re.compile(r"[0-9a-f-]{16,}")


def _without_ids(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _without_ids(v, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_ids(v) for v in value]
    if key in _TIMES and value is not None:
        return "<time>"
    if isinstance(value, str) and (_ID.fullmatch(value) or _HEX.fullmatch(value)):
        return "<id>"
    return value


_CACHED = frozenset(
    {"cached_tokens", "created_cache_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"}
)


def _without_cached(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "<count>" if k in _CACHED and v is not None else _without_cached(v) for k, v in value.items()}
    return [_without_cached(v) for v in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _paths(value: Any, where: str = "") -> list[str]:
    if isinstance(value, dict):
        return [path for k, v in value.items() for path in (f"{where}/{k}", *_paths(v, f"{where}/{k}"))]
    return [path for v in value for path in _paths(v, f"{where}/*")] if isinstance(value, list) else []


def _strings(value: Any, where: str = "") -> list[tuple[str, str]]:
    """Every string in a value with its path; choices and tool calls are named by their index."""
    if isinstance(value, str):
        return [(where, value)]
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _strings(v, f"{where}/{k}")]
    if isinstance(value, list):
        indexed = [(v.get("index", i) if isinstance(v, dict) else i, v) for i, v in enumerate(value)]
        return [pair for i, v in indexed for pair in _strings(v, f"{where}/{i}")]
    return []
