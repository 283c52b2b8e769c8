"""Replays and their inverse: every form of an answer told as a stream folds back into the same answer."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helium_proxy.reuse import Entry, StreamAssembler, as_json, as_sse, make_entry
from helium_proxy.reuse.replay import events
from helium_proxy.reuse.sse import EventSplitter, payload

from .answers import ANSWERS, CHAT, CHAT_USAGE, COMPLETIONS, MESSAGES, RESPONSES

EACH = pytest.mark.parametrize(("route", "answer"), ANSWERS.values(), ids=ANSWERS.keys())


def kept(route: str, answer: dict[str, Any]) -> Entry:
    entry = make_entry(answer, route=route, tenant="t", model="demo", now=1_700_000_000.5)
    assert entry is not None
    return entry


def own(answer: dict[str, Any], new_id: str = "new", now: int = 1_800_000_000) -> dict[str, Any]:
    times = {name: now for name in ("created", "created_at") if name in answer}
    return {**answer, "id": new_id, **times}


def folded(route: str, stream: bytes, step: int) -> dict[str, Any] | None:
    assembler = StreamAssembler(route)
    for start in range(0, len(stream), step):
        assembler.feed(stream[start : start + step])
    return assembler.result()


@EACH
def test_json_has_an_id_and_a_time_of_its_own_and_is_else_the_original(route: str, answer: dict[str, Any]) -> None:
    entry = kept(route, answer)
    assert orjson.loads(as_json(entry, "new", 1_800_000_000.9)) == own(answer)
    if answer["usage"] is not None:
        assert (entry.prompt_tokens, entry.output_tokens) == ((3 if route == MESSAGES else 11), 5)


@EACH
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_a_replayed_stream_folds_back_into_the_answer(route: str, answer: dict[str, Any], step: int) -> None:
    stream = b"".join(as_sse(kept(route, answer), "new", 1_800_000_000, include_usage=True))
    assert folded(route, stream, step) == own(answer)


@EACH
def test_a_stream_cut_anywhere_is_no_answer(route: str, answer: dict[str, Any]) -> None:
    pieces = as_sse(kept(route, answer), "new", 1_800_000_000, include_usage=True)
    for count in range(len(pieces)):
        assert folded(route, b"".join(pieces[:count]), 10_000) is None
    assert folded(route, b"".join(pieces)[:-3], 10_000) is None


@EACH
def test_a_stream_with_an_error_is_no_answer(route: str, answer: dict[str, Any]) -> None:
    pieces = as_sse(kept(route, answer), "new", 1_800_000_000)
    error = b'data: {"error": {"message": "engine died"}}\n\n'
    if route == MESSAGES:
        error = b'event: error\ndata: {"type": "error", "error": {"type": "internal_error"}}\n\n'
    assert folded(route, b"".join([*pieces[:2], error, *pieces[2:]]), 10_000) is None


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_usage_is_told_to_who_asks(route: str) -> None:
    name = "chat" if route == CHAT else "completions"
    entry = kept(*ANSWERS[name])
    silent, telling = (as_sse(entry, "new", 1, include_usage=flag) for flag in (False, True))
    assert not any(b"usage" in piece for piece in silent)
    assert len(telling) == len(silent) + 1
    last = orjson.loads(payload(telling[-2]))
    assert (last["choices"], last["usage"]) == ([], CHAT_USAGE)
    assert telling[-1] == silent[-1] == b"data: [DONE]\n\n"


def test_a_response_repeats_its_askers_metadata_not_the_originals() -> None:
    entry = kept(*ANSWERS["responses"])
    asked = {"metadata": {"run": "two"}, "user": "me"}
    told = orjson.loads(as_json(entry, "new", 1, asked))
    assert (told["metadata"], told["user"]) == ({"run": "two"}, "me")
    for piece in as_sse(entry, "new", 1, request=asked):
        event = orjson.loads(payload(piece))
        if "response" in event:
            assert event["response"]["metadata"] == {"run": "two"}


def test_transfer_parameters_are_one_calls_own() -> None:
    route, answer = ANSWERS["chat"]
    entry = kept(route, {**answer, "kv_transfer_params": {"helium": {"pinned_blocks": 4}}})
    assert orjson.loads(as_json(entry, "new", 1_800_000_000)) == {**own(answer), "kv_transfer_params": None}


def test_a_pooling_answer_replays_as_json_only() -> None:
    tokens = {"count": 2, "max_model_len": 10, "tokens": [1, 2]}
    entry = kept("/v1/embeddings", tokens)
    assert orjson.loads(as_json(entry, "new", 1)) == tokens, "no id where the route has none"
    assert as_json(kept("/v1/embeddings", {"id": "x"}), "new", 1) == b'{"id":"new"}'
    with pytest.raises(ValueError, match="no streams"):
        as_sse(entry, "new", 1)


# -- live streams in vLLM's own form, which differ from our replays


def chunk(delta: dict[str, Any], **choice: Any) -> bytes:
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "demo"}
    return b"data: " + orjson.dumps({**body, "choices": [{"index": 0, "delta": delta, **choice}]}) + b"\n\n"


def test_a_live_chat_stream() -> None:
    logprobs = [{"content": [{"token": t, "logprob": -1.0, "bytes": None, "top_logprobs": []}]} for t in "ab"]
    stream = b"".join(
        [
            b": ping\r\n\r\n",
            chunk({"role": "assistant", "content": ""}, logprobs=None, finish_reason=None),
            chunk({"reasoning": "be"}),
            chunk({"reasoning": "cause"}),
            chunk({"content": "a"}, logprobs=logprobs[0], token_ids=[1]),
            chunk({"content": "b"}, logprobs=logprobs[1], token_ids=[2]),
            chunk({"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f"}}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}),
            chunk({"content": ""}, finish_reason="tool_calls", stop_reason=None),
            b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"demo","choices":[],'
            b'"usage":{"prompt_tokens":1,"total_tokens":3,"completion_tokens":2}}\n\n',
            b"data: [DONE]\n\n",
        ]
    )
    assembler = StreamAssembler(CHAT)
    assembler.feed(stream)
    assert (assembler.text, assembler.tool_call_ids) == ("ab", ("c1",))
    assert assembler.usage == {"prompt_tokens": 1, "total_tokens": 3, "completion_tokens": 2}
    assert assembler.result() == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "demo",
        "usage": assembler.usage,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "ab",
                    "reasoning": "because",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
                    ],
                },
                "logprobs": {"content": logprobs[0]["content"] + logprobs[1]["content"]},
                "finish_reason": "tool_calls",
                "stop_reason": None,
                "token_ids": [1, 2],
            }
        ],
    }


def test_an_aborted_stream_folds_but_is_never_kept() -> None:
    stream = chunk({"content": "a"}) + chunk({}, finish_reason="abort") + b"data: [DONE]\n\n"
    answer = folded(CHAT, stream, 10_000)
    assert answer is not None
    assert make_entry(answer, route=CHAT, tenant="t", model="demo", now=0) is None


@pytest.mark.parametrize(("name", "ids"), [("responses", ("call_1",)), ("messages", ("toolu_1", "toolu_2"))])
def test_text_and_tool_call_ids_of_the_other_families(name: str, ids: tuple[str, ...]) -> None:
    route, answer = ANSWERS[name]
    assembler = StreamAssembler(route)
    for piece in as_sse(kept(route, answer), "new", 1):
        assembler.feed(piece)
    assert (assembler.text, assembler.tool_call_ids) == ("Grüße", ids)


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
@given(data=st.binary(max_size=60))
def test_garbage_never_raises_and_is_no_answer(route: str, data: bytes) -> None:
    for stream in (data, b"data: " + data + b"\n\n", b'data: {"choices": [' + data + b"]}\n\n"):
        assembler = StreamAssembler(route)
        assembler.feed(stream)
        assert assembler.result() is None


def test_a_stream_larger_than_the_bound_is_given_up() -> None:
    assembler = StreamAssembler(CHAT, max_bytes=1000)
    for _ in range(100):
        assembler.feed(chunk({"content": "x" * 50}))
    assert not assembler.refused, "the client has its answer all the same"
    assert assembler.result() is None


def test_an_endless_event_is_given_up() -> None:
    splitter = EventSplitter(limit=100)
    assert list(splitter.feed(b"x" * 100)) == []
    with pytest.raises(ValueError, match="more than 100"):
        list(splitter.feed(b"x"))


# -- the official client reads our replays


def _client(pieces: list[bytes], json: bytes) -> openai.OpenAI:
    def answer(request: httpx.Request) -> httpx.Response:
        if orjson.loads(request.content).get("stream"):
            return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=b"".join(pieces))
        return httpx.Response(200, headers={"content-type": "application/json"}, content=json)

    transport = httpx.MockTransport(answer)
    return openai.OpenAI(base_url="http://test/v1", api_key="k", http_client=httpx.Client(transport=transport))


WHOLE_CHATS = [
    name for name, (route, a) in ANSWERS.items() if route == CHAT and a["choices"][0]["finish_reason"] != "length"
]
"""The client refuses to parse an answer that was cut by max_tokens."""


@pytest.mark.parametrize("name", WHOLE_CHATS)
def test_openai_reads_a_chat_replay(name: str) -> None:
    route, answer = ANSWERS[name]
    entry = kept(route, answer)
    client = _client(as_sse(entry, "new", 1, include_usage=True), as_json(entry, "new", 1))
    messages: Any = [{"role": "user", "content": "x"}]
    with client, client.chat.completions.stream(model="demo", messages=messages) as stream:
        final = stream.get_final_completion()
        whole = client.chat.completions.create(model="demo", messages=messages)
    message, expected = final.choices[0].message, answer["choices"][0]["message"]
    assert (final.id, whole.id) == ("new", "new")
    assert (message.content or "") == (expected["content"] or "")
    calls = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls or ()]
    for call in calls:
        call["function"].pop("parsed_arguments", None)
    assert calls == expected.get("tool_calls", [])
    assert final.choices[0].finish_reason == answer["choices"][0]["finish_reason"]
    assert final.usage is not None
    assert final.usage.total_tokens == 16


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_openai_reads_a_responses_replay(status: str) -> None:
    route, answer = ANSWERS["responses"]
    details = {"reason": "max_output_tokens"} if status == "incomplete" else None
    entry = kept(route, {**answer, "status": status, "incomplete_details": details})
    client = _client(as_sse(entry, "new", 1), as_json(entry, "new", 1))
    with client, client.responses.stream(model="demo", input="x") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert (final.id, final.status, final.output_text) == ("new", status, "Grüße")
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


def test_events_of_a_live_answer_need_no_entry() -> None:
    route, answer = ANSWERS["completions"]
    assert folded(route, b"".join(events(answer, route, True)), 10_000) == answer
