"""What is read out of responses of each API, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from helium_proxy.workflow import Reply, StreamedReply, reply_of

CHAT = {
    "id": "chatcmpl-1",
    "choices": [
        {
            "message": {
                "role": "assistant",
                "content": "Let me look.",
                "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": '{"q": "sun"}'}}],
            }
        }
    ],
}
RESPONSES = {
    "id": "resp_1",
    "output": [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"q": "sun"}'},
    ],
}
MESSAGES = {
    "id": "msg_1",
    "type": "message",
    "content": [
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"q": "sun"}},
    ],
}


def test_whole_responses() -> None:
    assert reply_of(CHAT) == Reply('Let me look.\n{"q": "sun"}', ("call_1",), "chatcmpl-1")
    assert reply_of(RESPONSES) == Reply('Let me look.\n{"q": "sun"}', ("call_1",), "resp_1")
    assert reply_of(MESSAGES) == Reply("Let me look.\nsun", ("toolu_1",), "msg_1")
    assert reply_of({"id": "cmpl-1", "choices": [{"text": " and so on"}]}) == Reply(" and so on", (), "cmpl-1")


@pytest.mark.parametrize("strange", [None, [], "x", {"choices": [None, {"message": 3}]}, {"output": "x"}])
def test_strange_responses_are_empty(strange: Any) -> None:
    assert reply_of(strange).text == ""


def stream(*events: Any) -> Reply:
    reader = StreamedReply()
    for event in events:
        reader.feed(event)
    return reader.reply()


def test_chat_stream() -> None:
    def chunk(**delta: Any) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta}]}

    def call(arguments: str, **rest: Any) -> dict[str, Any]:
        return chunk(tool_calls=[{"index": 0, "function": {"arguments": arguments}, **rest}])

    said = stream(
        chunk(role="assistant", content=""),
        chunk(content="Let me"),
        chunk(content=" look."),
        call("", id="call_1"),
        call('{"q": '),
        call('"sun"}'),
        {"id": "chatcmpl-1", "choices": [], "usage": {}},
        None,
    )
    assert said == reply_of(CHAT)


def test_responses_stream() -> None:
    events = (
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.completed", "response": RESPONSES},
    )
    assert stream(*events) == reply_of(RESPONSES)


def test_messages_stream() -> None:
    said = stream(
        {"type": "message_start", "message": {"id": "msg_1"}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Let me look."}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "toolu_1"}},
        {
            "type": "content_block_delta",
            "index": 1,
            "delta": {"type": "input_json_delta", "partial_json": '{"q": "sun"}'},
        },
    )
    assert said == Reply('Let me look.\n{"q": "sun"}', ("toolu_1",), "msg_1")


def test_what_is_kept_of_a_long_stream_is_bounded() -> None:
    piece = "x" * 100_000
    said = stream(*({"id": "c", "choices": [{"delta": {"content": piece}}]} for _ in range(20)))
    assert len(said.text) <= 300_000
