"""What is read out of responses of each API, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

from helium_proxy.workflow import Reply, reply_of

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
