"""A request's prompt as a chain of messages, each digested once.

Agents re-send their whole conversation with every call, so nearly every message of a call has been seen
before. A message is therefore reduced to what later steps need (digest, role, tool-call ids, text units) and
kept in one LRU by the digest of its JSON; a conversation is the rolling hash of its messages' digests.

Text is compared in *units*: what lies between line breaks, sentence ends, quotes, brackets and escapes. A unit
survives being cut out of a reply, put into a template, wrapped in JSON or parsed out of it. Units are found
with C-speed tools only (`bytes.translate`, `str.split`), never a loop over characters.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
import xxhash

MIN_UNIT_CHARS = 16
"""Shorter units are too common to say where a text came from."""

_BREAKS = b'.!?;:"\\{}[]<>()|*#`=\t\r'
_TO_LINES = bytes.maketrans(_BREAKS, b"\n" * len(_BREAKS))
_BREAK_RUN = re.compile("[" + re.escape(_BREAKS.decode()) + "\n\u2018\u2019\u201c\u201d\u3002\uff01\uff1f\u2014]+")
_UNICODE_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


def units(text: str) -> dict[int, int]:
    """Hash → length of each unit of `text` that is long enough to matter, in order of appearance."""
    if "\\" in text:
        text = text.replace("\\n", "\n").replace("\\t", "\n").replace("\\r", "\n")
        if "\\u" in text:
            text = _UNICODE_ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
    if "'" in text:  # quotes, not apostrophes
        text = text.replace(" '", "\n").replace("' ", "\n").replace("'\n", "\n").replace("\n'", "\n")
    if "- " in text:
        text = text.replace("- ", "\n")
    ascii_only = text.isascii()
    parts = text.encode().translate(_TO_LINES).decode().split("\n") if ascii_only else _BREAK_RUN.split(text)
    long = [part for part in map(str.strip, parts) if len(part) >= MIN_UNIT_CHARS]
    return dict(zip(map(hash, long), map(len, long), strict=True))


def text_key(text: str) -> int:
    """Equal for texts that differ in surrounding white space only; 0 for an empty text."""
    text = text.strip()
    return hash(text) if text else 0


@dataclass(slots=True, eq=False)
class Message:
    """One message, as much of it as is worth keeping."""

    digest: int
    role: str
    chars: int
    calls: tuple[str, ...]
    """Ids of tool calls made in it (assistant)."""
    results: tuple[str, ...]
    """Ids of tool calls it answers."""
    key: int
    """`text_key` of its text."""
    first_seen: float
    """When this message was first sent by anybody: it cannot stem from a reply that came later."""
    units: Mapping[int, int] | None = None
    """Filled when the message is first searched."""
    hits: Sequence[tuple[int, Any]] | None = None
    """Units found in the tenant's reply index at that time, with their postings. A message cannot stem from a
    later reply, so it is never searched again."""


class Prompt(msgspec.Struct, frozen=True):
    """The messages of one call and the rolling hash after each."""

    messages: tuple[Message, ...]
    raw: Sequence[Any]
    """The client's own objects, for those messages; not kept after arrival."""
    chain: tuple[int, ...]
    """`chain[i]` stands for messages 0..i-1; `chain[0]` for the empty prompt with this model."""
    previous: str | None
    """A Responses call's ``previous_response_id``."""

    @property
    def whole(self) -> int:
        """Hash of the whole prompt."""
        return self.chain[-1]


class MessageCache:
    """LRU of messages by the digest of their JSON, shared by all tenants of one process.

    Sharing holds digests only: what one tenant's reply matches is looked up in that tenant's own index. The
    model and tenant enter the chain, not the digest.
    """

    def __init__(self, capacity: int) -> None:
        # Mutable state: (tenant, digest of a message's JSON) → Message, least recently used first.
        self._capacity = capacity
        self._messages: OrderedDict[tuple[str, int], Message] = OrderedDict()

    def __len__(self) -> int:
        return len(self._messages)

    def __repr__(self) -> str:
        return f"<MessageCache {len(self._messages)} of {self._capacity}>"

    def read(self, tenant: str, route: str, model: str, body: Mapping[str, Any], now: float) -> Prompt:
        """The prompt of a request body of any of the four routes; parts of unknown shape are skipped."""
        given = body.get("messages")
        if type(given) is list and "system" not in body and route.endswith("/chat/completions"):
            raw = [item for item in given if isinstance(item, dict)]
        else:
            raw = list(_raw_messages(route, body))
        messages: list[Message] = []
        last = hash((tenant, model))
        chain = [last]
        cache = self._messages
        for item in raw:
            digest = digest_of(item)
            key = (tenant, digest)
            message = cache.get(key)
            if message is None:
                message = cache[key] = _read_message(item, digest, now)
                if len(cache) > self._capacity:
                    cache.popitem(last=False)
            else:
                cache.move_to_end(key)
            messages.append(message)
            last = hash((last, digest))
            chain.append(last)
        previous = body.get("previous_response_id")
        return Prompt(
            tuple(messages), raw, tuple(chain), previous if isinstance(previous, str) and previous else None
        )


def digest_of(item: Any) -> int:
    try:
        raw = orjson.dumps(item, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # lone surrogates, integers of more than 64 bits
        raw = repr(item).encode("utf-8", "surrogatepass")
    return xxhash.xxh3_64_intdigest(raw)


def _raw_messages(route: str, body: Mapping[str, Any]) -> Iterator[Any]:
    """The items a prompt consists of, whatever the route calls them."""
    if route.endswith("/responses"):
        if isinstance(body.get("instructions"), str):
            yield {"role": "system", "content": body["instructions"]}
        yield from _items(body.get("input"))
    elif route.endswith("/completions") and "messages" not in body:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            yield {"role": "user", "content": prompt}
        elif isinstance(prompt, list):
            yield from ({"role": "user", "content": part} for part in prompt[:64])
    else:
        if body.get("system"):  # the Messages API
            yield {"role": "system", "content": body["system"]}
        yield from _items(body.get("messages"))


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, str):
        yield {"role": "user", "content": value}
    elif isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def _read_message(item: Mapping[str, Any], digest: int, now: float) -> Message:
    content = item.get("content")
    if len(item) == 2 and isinstance(content, str) and "role" in item:  # by far the most
        return Message(digest, str(item["role"]), len(content), (), (), text_key(content), now)
    role = str(item.get("role") or "")
    calls: list[str] = []
    results: list[str] = []
    kind = item.get("type")
    if kind == "function_call":  # the Responses API's items
        role = "assistant"
        calls.append(str(item.get("call_id")))
    elif kind == "function_call_output":
        role = "tool"
        results.append(str(item.get("call_id")))
    made = item.get("tool_calls") or ()
    calls += [str(call["id"]) for call in made if isinstance(call, dict) and call.get("id")]
    if item.get("tool_call_id"):
        results.append(str(item["tool_call_id"]))
    if isinstance(content, list):
        for block in content:
            if isinstance(block, dict):
                if block.get("type") == "tool_use" and block.get("id"):
                    calls.append(str(block["id"]))
                elif block.get("type") == "tool_result" and block.get("tool_use_id"):
                    results.append(str(block["tool_use_id"]))
    text = text_of(item)
    return Message(digest, role, len(text), tuple(calls), tuple(results), text_key(text), now)


def text_of(item: Mapping[str, Any]) -> str:
    """All text of a message of any API: strings, text blocks, tool results, tool-call arguments."""
    content = item.get("content")
    if isinstance(content, str) and "tool_calls" not in item:
        return content
    return "\n".join(_texts(item))


def _texts(item: Mapping[str, Any]) -> Iterator[str]:
    for key in ("content", "output", "arguments", "text", "refusal"):
        value = item.get(key)
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for block in value:
                if isinstance(block, str):
                    yield block
                elif isinstance(block, dict):
                    yield from _texts(block)
    if isinstance(item.get("input"), dict):  # tool_use
        yield from _leaves(item["input"])
    for call in item.get("tool_calls") or ():
        if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
            yield from (value for value in (function.get("arguments"),) if isinstance(value, str))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)
