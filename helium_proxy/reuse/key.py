"""Which answers may be reused, and the key under which equal requests meet.

Deterministic means ``temperature`` 0, said explicitly, and one choice (``n`` absent or 1). Embedding, rerank, score
and tokenize routes always are. A request that reads or writes server state, runs a tool on the server, or refers to
a remote file is not, whatever its temperature: the same body may have another answer tomorrow.

The key is a BLAKE2b digest of (tenant, model, route, canonical body): an answer must never reach a question that
merely collides, so a fast non-cryptographic hash will not do. Fields in `IRRELEVANT` cannot change the answer and are
left out; **unknown fields are part of the key**. The order of a body's own fields does not matter, and its numbers
and those in ``logit_bias`` compare by value (``0`` is ``0.0``); what lies deeper (a schema, a tool) is text the model
reads, or decides in which order it writes. Whether a stream is asked for is part of the key, too: engines cut tool
calls out of a stream otherwise than out of a whole answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from operator import itemgetter
from typing import Any

import orjson

from helium_proxy.reuse.routes import Family, family

IRRELEVANT = frozenset(
    {
        "helium",  # the proxy's own tags
        "metadata",  # echoed by /v1/responses, see replay.as_json
        "model",  # the resolved model is in the key
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "session_id",  # labels KV events
        "stream_options",
        "user",
    }
)
"""Top-level fields of a body that cannot change its answer."""

NESTED_IRRELEVANT = {
    "kv_transfer_params": frozenset({"helium"}),
    "nvext": frozenset({"agent_hints", "agent_context"}),
    "vllm_xargs": frozenset({"agentic_context", "kv_cache_report_mode"}),
}
"""Fields inside a top-level object that cannot change the answer; the object's other fields can."""

_DEFAULTS: Mapping[str, tuple[object, ...]] = {"n": (None, 1), "store": (None,), "stream": (None, False)}
"""Values that mean the same as leaving the field out."""

_STATEFUL = ("store", "previous_response_id", "background", "conversation", "prompt")
_POOLED = ("query", "queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")
"""Where scores and ranks have their texts, which may be parts with media."""
_CLIENT_TOOLS = frozenset({"function", "custom"})


def cacheable(body: Mapping[str, Any], route: str) -> bool:
    """Whether an equal request may be given the same answer."""
    kind = family(route)
    if kind is Family.OTHER:
        return False
    transfer = body.get("kv_transfer_params")
    if transfer and any(key != "helium" for key in transfer):
        return False  # part of a transfer between engines
    if kind is Family.POOLING:
        return not _remote_media(body.get("messages")) and not any(_is_remote(body.get(name)) for name in _POOLED)
    temperature = body.get("temperature")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature != 0:
        return False
    if body.get("n") not in (None, 1):
        return False
    if kind is Family.RESPONSES:
        if any(body.get(name) for name in _STATEFUL):
            return False
        tools = body.get("tools")
        if isinstance(tools, list) and any(
            not isinstance(tool, dict) or tool.get("type") not in _CLIENT_TOOLS for tool in tools
        ):
            return False
        return not _remote_media(body.get("input"))
    return not _remote_media(body.get("messages"))


def cache_key(tenant: str, model: str, route: str, body: Mapping[str, Any]) -> bytes:
    """The 20-byte key of a request: equal for requests that must have equal answers, and for no others. `model`: all
    that says which weights answer."""
    canonical: dict[str, Any] = {}
    for name, value in body.items():
        if name in IRRELEVANT:
            continue
        if name in _DEFAULTS and value in _DEFAULTS[name]:
            continue
        if isinstance(value, float) and value.is_integer():
            canonical[name] = int(value)
        elif name in NESTED_IRRELEVANT and isinstance(value, dict):
            kept = {key: item for key, item in value.items() if key not in NESTED_IRRELEVANT[name]}
            if kept:
                canonical[name] = kept
        elif name == "logit_bias" and isinstance(value, dict):
            canonical[name] = {key: _number(item) for key, item in sorted(value.items())}
        else:
            canonical[name] = value
    parts = [tenant, model, route, sorted(canonical.items(), key=itemgetter(0))]
    try:
        text = orjson.dumps(parts)
    except TypeError:  # an integer of more than 64 bits, a lone surrogate: the slow encoder knows them
        text = json.dumps(parts, separators=(",", ":")).encode()
    return blake2b(text, digest_size=20).digest()


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _remote_media(messages: Any) -> bool:
    """Whether any content part names a file outside the request: an http(s) URL or an uploaded file's id."""
    if not isinstance(messages, list):
        return False
    for message in messages:
        for name in ("content", "output"):
            content = message.get(name) if isinstance(message, dict) else None
            if not isinstance(content, list):
                continue
            for part in content:
                if isinstance(part, dict) and part.get("type") not in _INLINE_PARTS and _is_remote(part):
                    return True
    return False


_INLINE_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "tool_use", "reasoning_text"})


def _is_remote(value: Any) -> bool:
    if isinstance(value, dict):
        return any(
            (name == "file_id" and bool(item))
            or (name.endswith("url") and isinstance(item, str) and not item.startswith("data:"))
            or (isinstance(item, dict | list) and _is_remote(item))
            for name, item in value.items()
        )
    return isinstance(value, list) and any(_is_remote(item) for item in value)
