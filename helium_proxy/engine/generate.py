"""What the engine answers: text, tool calls or JSON, as a deterministic function of the prompt's tokens.

Equal prompts get equal replies on every engine with the same seed, whatever the batch; different prompts get
different ones. With a lower `max_tokens` a reply is a prefix of the longer one, as under greedy sampling.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import xxhash

from .text import END, PIECES, Tokenizer, tool_call_text

FinishReason = Literal["stop", "length", "tool_calls"]

_TEXT = (
    "the of to and in is it that for on with as are be this by from at or an have not but which they can all "
    "will one more when there some time two first new so up only other over then after most also into between "
    "each such many these part plan model query cache token batch prefix worker node agent call step result "
    "value price market risk trend signal growth report review point claim reason answer support counter "
    "weight measure strong weak early late high low long short open closed local global current future past "
    "stable careful clear direct likely simple whole given known large small change level limit order path "
    "source target state input output stage graph tree branch round debate expert summary draft note fact"
)
WORDS = tuple(" " + word for word in _TEXT.split())
_LONGEST_NATURAL = 160


@dataclass(frozen=True, slots=True)
class Sampling:
    """What shapes a reply, as read from a request."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    salt: str = ""
    """Anything else that makes the reply another: a client's `seed` at a temperature above 0."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply, known before it is generated. `pieces[i]` is the text that token i adds."""

    tokens: array[int]
    pieces: tuple[str, ...]
    finish_reason: FinishReason
    stop_reason: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def seed_of(prompt: array[int], *extra: object) -> int:
    """A 64-bit seed from a prompt's tokens and whatever else the reply depends on."""
    return xxhash.xxh3_64_intdigest(prompt.tobytes(), xxhash.xxh3_64_intdigest(repr(extra).encode()))


def free_text(tokenizer: Tokenizer, seed: int, sampling: Sampling) -> Reply:
    """Words, ending by themselves within 160 tokens unless told otherwise."""
    rng = random.Random(seed)
    natural = max(16 + seed % (_LONGEST_NATURAL - 16), sampling.min_tokens)
    ends = not sampling.ignore_eos and natural < sampling.max_tokens
    n = natural if ends else sampling.max_tokens
    words = rng.choices(WORDS, k=n)
    words[0] = words[0].strip().capitalize()
    for i in range(9, n, 10):
        words[i] = "."
    return _finish(tokenizer, words, ends, sampling)


def fixed_text(tokenizer: Tokenizer, text: str, sampling: Sampling, tool_calls: tuple[ToolCall, ...] = ()) -> Reply:
    """`text` (JSON, a tool call), cut at `max_tokens`; with `ignore_eos` padded with spaces to it."""
    pieces = PIECES.findall(text)
    ends = len(pieces) < sampling.max_tokens and not sampling.ignore_eos
    if sampling.ignore_eos:
        pieces += [" "] * (sampling.max_tokens - len(pieces))
    reply = _finish(tokenizer, pieces[: sampling.max_tokens], ends, sampling)
    if not tool_calls:
        return reply
    if reply.finish_reason == "length" and len("".join(reply.pieces)) < len(text):
        return reply  # cut short: no call came about
    return Reply(reply.tokens, reply.pieces, "tool_calls", None, tool_calls)


def _finish(tokenizer: Tokenizer, pieces: list[str], ends: bool, sampling: Sampling) -> Reply:
    if sampling.stop:
        text = "".join(pieces)
        found = [(at, s) for s in sampling.stop if s and (at := text.find(s)) >= 0]
        if found:
            at, stop = min(found)
            return _cut(tokenizer, pieces, at, stop, include=sampling.include_stop)
    ids = [tokenizer.id(piece) for piece in pieces]
    if ends:
        return Reply(array("I", [*ids, tokenizer.id(END)]), (*pieces, ""), "stop")
    return Reply(array("I", ids), tuple(pieces), "length")


def _cut(tokenizer: Tokenizer, pieces: list[str], at: int, stop: str, *, include: bool) -> Reply:
    """The reply up to the token that completes `stop`, found at `at`; its text without or with `stop`."""
    end = at + len(stop)
    keep = end if include else at
    out: list[str] = []
    length = 0
    for piece in pieces:
        out.append(piece[: max(0, keep - length)])
        length += len(piece)
        if length >= end:
            break
    ids = array("I", [tokenizer.id(piece) for piece in pieces[: len(out)]])
    return Reply(ids, tuple(out), "stop", stop)


# -- structured output ------------------------------------------------------------------------------------------


def instance(schema: Any, seed: int) -> Any:
    """A value that satisfies a JSON schema of the usual keywords, chosen by `seed`."""
    return _instance(schema, random.Random(seed), schema if isinstance(schema, Mapping) else {}, 0)


def _instance(schema: Any, rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth > 16:
        return None
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return rng.choice(schema["enum"])
    if "$ref" in schema:
        return _instance(_resolve(schema["$ref"], root), rng, root, depth + 1)
    if schema.get("allOf"):
        merged: dict[str, Any] = {k: v for k, v in schema.items() if k != "allOf"}
        for member in schema["allOf"]:
            part = _resolve(member["$ref"], root) if "$ref" in member else member
            merged["properties"] = {**merged.get("properties", {}), **part.get("properties", {})}
            merged["required"] = [*merged.get("required", []), *part.get("required", [])]
            merged = {**part, **merged}
        return _instance(merged, rng, root, depth + 1)
    for union in ("anyOf", "oneOf"):
        if schema.get(union):
            at = 0 if depth > 8 else rng.randrange(len(schema[union]))
            return _instance(schema[union][at], rng, root, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind is None:
        kind = "object" if "properties" in schema else "array" if "items" in schema else "string"
    return _TYPES.get(kind, _null)(schema, rng, root, depth)


def _resolve(ref: str, root: Mapping[str, Any]) -> Any:
    node: Any = root
    for part in ref.removeprefix("#").strip("/").split("/"):
        if part:
            node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node


def _object(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    required = set(schema.get("required", ()))
    properties = schema.get("properties", {})
    keep = [k for k in properties if k in required or depth < 4]
    return {k: _instance(properties[k], rng, root, depth + 1) for k in keep}


def _array(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    low = schema.get("minItems", 0 if depth > 8 else 1)
    high = min(schema.get("maxItems", low + 2), low + 2)
    return [_instance(schema.get("items"), rng, root, depth + 1) for _ in range(rng.randint(low, max(low, high)))]


def _string(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    known = {
        "date": "2024-01-31",
        "date-time": "2024-01-31T12:00:00Z",
        "uuid": "0" * 8 + "-0000-4000-8000-" + "0" * 12,
    }
    if schema.get("format") in known:
        return known[schema["format"]]
    text = "".join(rng.choices(WORDS, k=rng.randint(1, 6))).strip()
    low, high = schema.get("minLength", 0), schema.get("maxLength", 1 << 16)
    return (text + "." * max(0, low - len(text)))[:high]


def _number(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = max(low, schema.get("maximum", schema.get("exclusiveMaximum", low + 100)))
    if schema.get("type") == "integer":
        low, high = int(low) + ("exclusiveMinimum" in schema), int(high) - ("exclusiveMaximum" in schema)
        step = int(schema.get("multipleOf", 1)) or 1
        value = rng.randint(low, max(low, high))
        return max(value - value % step, -(-low // step) * step)
    return round(low + (high - low) * (0.25 + rng.random() / 2), 6)


def _boolean(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    return rng.random() < 0.5


def _null(schema: Mapping[str, Any], rng: random.Random, root: Mapping[str, Any], depth: int) -> Any:
    return None


_TYPES = {
    "object": _object,
    "array": _array,
    "string": _string,
    "number": _number,
    "integer": _number,
    "boolean": _boolean,
    "null": _null,
}


def choose_tool(tools: Sequence[Any], choice: Any, seed: int, *, answered: bool) -> Mapping[str, Any] | None:
    """The function to call, if any: the named one; one of all if a call is required; under `auto` a call for half of
    the prompts, and none right after a tool's result (`answered`)."""
    functions: list[Mapping[str, Any]] = [
        t["function"] for t in tools
        if isinstance(t, Mapping) and isinstance(t.get("function"), Mapping) and t["function"].get("name")
    ]  # fmt: skip
    if not functions or choice == "none":
        return None
    if isinstance(choice, Mapping):
        named = choice.get("function")
        name = (named if isinstance(named, Mapping) else choice).get("name")
        return next((f for f in functions if f["name"] == name), None)
    if choice == "required" or (not answered and seed >> 8 & 1):
        return functions[seed % len(functions)]
    return None


def tool_call(tokenizer: Tokenizer, function: Mapping[str, Any], seed: int, sampling: Sampling) -> Reply:
    """A reply that calls `function` with arguments satisfying its schema."""
    arguments = orjson.dumps(instance(function.get("parameters") or {"type": "object"}, seed)).decode()
    call = ToolCall(str(function["name"]), arguments)
    return fixed_text(tokenizer, tool_call_text(call.name, call.arguments), sampling, (call,))


def json_reply(tokenizer: Tokenizer, schema: Any, seed: int, sampling: Sampling) -> Reply:
    """A reply in JSON satisfying `schema`; None: any object."""
    value = (
        {"answer": "".join(random.Random(seed).choices(WORDS, k=4)).strip()}
        if schema is None
        else instance(schema, seed)
    )
    return fixed_text(tokenizer, orjson.dumps(value).decode(), sampling)
