"""Tokens and replies: reversible, stable, bounded, deterministic."""

from __future__ import annotations

from array import array
from threading import Event, Thread

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helium_proxy.engine import Tokenizer, render
from helium_proxy.engine.generate import (
    WORDS,
    Sampling,
    choose_tool,
    fixed_text,
    free_text,
    instance,
    json_reply,
    seed_of,
    tool_call,
)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_text_survives_the_round_trip(text: str) -> None:
    tokenizer = Tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_equal_in_every_process() -> None:
    assert Tokenizer().encode("The quick brown fox").tolist() == [3570264112, 1099906991, 1389034562, 440777710]


def test_memory_is_bounded() -> None:
    tokenizer = Tokenizer(cache_tokens=1000, vocabulary=500)
    for i in range(2000):
        tokenizer.encode(f"word number {i} of many ones {i * 7919}")
    pieces, texts, tokens = tokenizer.statistics()
    assert pieces <= 500
    assert 0 < tokens <= 1000
    assert texts < 200
    assert len(tokenizer._pieces) <= 500


def test_a_long_text_in_the_making_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer()
    tokenizer.encode("short")
    begun, go_on = Event(), Event()
    id_of = tokenizer.id

    def slow(piece: str) -> int:
        if piece == "long":
            begun.set()
            go_on.wait(10)
        return id_of(piece)

    monkeypatch.setattr(tokenizer, "id", slow)
    made: list[array[int]] = []
    long = Thread(target=lambda: made.append(tokenizer.encode("long text")))
    short = Thread(target=lambda: made.append(tokenizer.encode("short")))
    long.start()
    try:
        assert begun.wait(10)
        short.start()
        short.join(2)
        assert [len(tokens) for tokens in made] == [1]
    finally:
        go_on.set()
        long.join(10)
        short.join(10)
    assert tokenizer.statistics() == (3, 2, 3 + 2)  # a text counts for one token more


def test_a_text_encoded_twice_at_once_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer()
    id_of = tokenizer.id
    nested: list[array[int]] = []

    def again(piece: str) -> int:
        if not nested:
            monkeypatch.setattr(tokenizer, "id", id_of)
            thread = Thread(target=lambda: nested.append(tokenizer.encode("one two")), daemon=True)
            thread.start()
            thread.join(2)
        return id_of(piece)

    monkeypatch.setattr(tokenizer, "id", again)
    assert tokenizer.encode("one two") is nested[0]
    assert tokenizer.statistics() == (2, 1, 2 + 1)


def test_a_conversation_starts_with_its_earlier_turns_and_replies() -> None:
    tokenizer = Tokenizer()
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompt = render(tokenizer, turns)
    reply = free_text(tokenizer, seed_of(prompt), Sampling(max_tokens=1000))
    assert reply.finish_reason == "stop"
    turns += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "And then?"}]
    assert render(tokenizer, turns)[: len(prompt) + len(reply.tokens)] == prompt + reply.tokens


def test_the_words_are_one_token_each() -> None:
    tokenizer = Tokenizer()
    assert [len(tokenizer.encode(w)) for w in (*WORDS, "")] == [1] * len(WORDS) + [0]
    assert len(set(WORDS)) == len(WORDS)


def test_replies_differ_by_prompt_and_lengthen_by_prefix() -> None:
    tokenizer = Tokenizer()
    texts = {free_text(tokenizer, seed_of(array("I", [i])), Sampling(24)).text for i in range(500)}
    assert len(texts) == 500
    short = free_text(tokenizer, 5, Sampling(10, ignore_eos=True))
    long = free_text(tokenizer, 5, Sampling(300, ignore_eos=True))
    assert long.text.startswith(short.text)
    assert (len(short.tokens), len(long.tokens), long.finish_reason) == (10, 300, "length")
    assert tokenizer.encode(long.text) == long.tokens


def test_lengths_follow_the_request() -> None:
    tokenizer = Tokenizer()
    natural = len(free_text(tokenizer, 5, Sampling(5000)).tokens)
    assert natural < 200
    assert len(free_text(tokenizer, 5, Sampling(5000, min_tokens=400)).tokens) == 401  # and the end token


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_reply(include: bool) -> None:
    tokenizer = Tokenizer()
    whole = free_text(tokenizer, 5, Sampling(100, ignore_eos=True)).text
    stop = whole[40:47]
    reply = free_text(tokenizer, 5, Sampling(100, ignore_eos=True, stop=("no such", stop), include_stop=include))
    at = whole.index(stop)
    assert reply.text == whole[: at + (len(stop) if include else 0)]
    assert (reply.finish_reason, reply.stop_reason) == ("stop", stop)
    assert len(tokenizer.encode(whole[: at + len(stop)])) == len(reply.tokens) == len(reply.pieces)


SCHEMA = {
    "type": "object",
    "$defs": {"item": {"type": "object", "properties": {"id": {"type": "integer", "minimum": 3, "maximum": 9}}}},
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 12},
        "kind": {"enum": ["x", "y"]},
        "one": {"const": 1},
        "ratio": {"type": "number", "minimum": 0, "maximum": 1},
        "ok": {"type": "boolean"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 2, "maxItems": 3},
        "maybe": {"anyOf": [{"type": "null"}, {"type": "string"}]},
        "both": {"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "integer"}}}]},
    },
    "required": ["name", "kind"],
}


def test_json_satisfies_its_schema() -> None:
    for seed in range(50):
        value = instance(SCHEMA, seed)
        assert value == instance(SCHEMA, seed)
        assert set(value) == set(SCHEMA["properties"])  # type: ignore[call-overload]
        assert 3 <= len(value["name"]) <= 12
        assert value["kind"] in ("x", "y")
        assert value["one"] == 1
        assert 0 <= value["ratio"] <= 1
        assert value["ok"] in (True, False)
        assert 2 <= len(value["items"]) <= 3
        assert all(3 <= item["id"] <= 9 for item in value["items"])
        assert value["maybe"] is None or isinstance(value["maybe"], str)
        assert set(value["both"]) == {"a", "b"}


def test_a_recursive_schema_ends() -> None:
    schema = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "all": {"type": "array", "items": {"$ref": "#"}}},
    }
    assert len(orjson.dumps(instance(schema, 3))) < 100_000


def test_structured_replies_are_cut_or_padded_to_length() -> None:
    tokenizer = Tokenizer()
    whole = json_reply(tokenizer, SCHEMA, 5, Sampling(4000))
    assert set(orjson.loads(whole.text)) == set(SCHEMA["properties"])  # type: ignore[call-overload]
    assert whole.finish_reason == "stop"
    cut = json_reply(tokenizer, SCHEMA, 5, Sampling(9))
    assert (len(cut.tokens), cut.finish_reason) == (9, "length")
    padded = fixed_text(tokenizer, "{}", Sampling(20, ignore_eos=True))
    assert (len(padded.tokens), orjson.loads(padded.text)) == (20, {})


PARAMETERS = {"type": "object", "properties": {"q": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": PARAMETERS}} for n in ("search", "read")]


def test_tools_are_called_as_asked() -> None:
    assert choose_tool(TOOLS, "none", 1, answered=False) is None
    assert choose_tool([], "required", 1, answered=False) is None
    named = choose_tool(TOOLS, {"type": "function", "function": {"name": "read"}}, 1, answered=False)
    assert named is not None
    assert named["name"] == "read"
    auto = [choose_tool(TOOLS, "auto", s << 6, answered=False) for s in range(64)]
    assert 0 < auto.count(None) < 64
    assert all(choose_tool(TOOLS, "auto", s << 6, answered=True) is None for s in range(64))
    assert all(choose_tool(TOOLS, "required", s, answered=True) is not None for s in range(8))
    reply = tool_call(Tokenizer(), TOOLS[0]["function"], 5, Sampling(200))  # type: ignore[arg-type]
    assert reply.finish_reason == "tool_calls"
    assert set(orjson.loads(reply.tool_calls[0].arguments)) == {"q"}
    cut = tool_call(Tokenizer(), TOOLS[0]["function"], 5, Sampling(6))  # type: ignore[arg-type]
    assert (cut.finish_reason, cut.tool_calls) == ("length", ())
