"""Answers of each API family in vLLM's form, for the tests of this folder."""

from __future__ import annotations

from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"

CHAT_USAGE = {
    "prompt_tokens": 11,
    "total_tokens": 16,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 8},
}


def _logprob(token: str) -> dict[str, Any]:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


def _chat(message: dict[str, Any], finish: str, **choice: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-original",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", **message},
                "logprobs": None,
                "finish_reason": finish,
                "stop_reason": None,
                **choice,
            }
        ],
        "usage": CHAT_USAGE,
    }


_TOOLS = [
    {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"q": "ü"}'}},
    {"id": "call_2", "type": "function", "function": {"name": "stop", "arguments": ""}},
]

ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, _chat({"content": "Grüße, world"}, "stop")),
    "chat, empty": (CHAT, _chat({"content": ""}, "stop")),
    "chat, stopped by a string": (CHAT, _chat({"content": "a\n\nb"}, "stop", stop_reason="END")),
    "chat, reasoning": (CHAT, _chat({"content": "4", "reasoning": "2 + 2"}, "length")),
    "chat, reasoning only": (CHAT, _chat({"content": None, "reasoning": "2 +"}, "length")),
    "chat, older reasoning": (CHAT, _chat({"content": "4", "reasoning_content": "2 + 2"}, "stop")),
    "chat, tools": (CHAT, _chat({"content": None, "tool_calls": _TOOLS}, "tool_calls")),
    "chat, text and tools": (CHAT, _chat({"content": "Wait", "tool_calls": _TOOLS}, "tool_calls")),
    "chat, logprobs": (
        CHAT,
        _chat({"content": "Hi!"}, "stop", logprobs={"content": [_logprob("Hi"), _logprob("!")]}, token_ids=[5, 6]),
    ),
    "chat, token ids": (
        CHAT,
        {**_chat({"content": "Hi"}, "stop", token_ids=[5]), "prompt_token_ids": [1, 2], "system_fingerprint": "f"},
    ),
    "completions": (
        COMPLETIONS,
        {
            "id": "cmpl-original",
            "object": "text_completion",
            "created": 1700000000,
            "model": "demo",
            "choices": [
                {
                    "index": i,
                    "text": text,
                    "logprobs": {
                        "text_offset": [0],
                        "token_logprobs": [-0.5],
                        "tokens": [text],
                        "top_logprobs": [{text: -0.5}],
                    },
                    "finish_reason": "length",
                    "stop_reason": None,
                }
                for i, text in enumerate(("one", "two"))
            ],
            "usage": CHAT_USAGE,
        },
    ),
    "responses": (
        RESPONSES,
        {
            "id": "resp_original",
            "created_at": 1700000000,
            "object": "response",
            "model": "demo",
            "status": "completed",
            "metadata": {"run": "one"},
            "incomplete_details": None,
            "instructions": None,
            "parallel_tool_calls": True,
            "temperature": 0.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "output": [
                {
                    "id": "rs_1",
                    "type": "reasoning",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Hm"}],
                    "status": "completed",
                },
                {
                    "id": "msg_1",
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Grüße", "annotations": [], "logprobs": None}],
                },
                {
                    "id": "fc_1",
                    "type": "function_call",
                    "call_id": "call_1",
                    "name": "find",
                    "arguments": '{"q": 1}',
                    "status": "completed",
                },
            ],
            "usage": {
                "input_tokens": 11,
                "input_tokens_details": {"cached_tokens": 8},
                "output_tokens": 5,
                "output_tokens_details": {"reasoning_tokens": 1},
                "total_tokens": 16,
            },
            "user": None,
        },
    ),
    "responses, cut by max_output_tokens": (
        RESPONSES,
        {
            "id": "resp_original",
            "created_at": 1700000000,
            "object": "response",
            "model": "demo",
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "output": [],
            "usage": None,
        },
    ),
    "messages": (
        MESSAGES,
        {
            "id": "msg_original",
            "type": "message",
            "role": "assistant",
            "model": "demo",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": "s1"},
                {"type": "text", "text": "Grüße"},
                {"type": "tool_use", "id": "toolu_1", "name": "find", "input": {"q": "ü", "n": [1, 2]}},
                {"type": "tool_use", "id": "toolu_2", "name": "stop", "input": {}},
            ],
            "stop_reason": "tool_use",
            "stop_sequence": None,
            "usage": {"input_tokens": 3, "output_tokens": 5, "cache_read_input_tokens": 8},
        },
    ),
}
