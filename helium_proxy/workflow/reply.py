"""What a response says that later prompts may repeat: text, tool calls and their arguments, its id.

`Outcome.reply_text` should be `Reply.text`: the assistant's text *and* the arguments of its tool calls, since
an agent used as a tool gets its prompt from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from helium_proxy.workflow.prompt import text_of

MAX_TEXT_CHARS = 262_144
"""Longer replies are cut: what is kept suffices to recognise them."""


class Reply(msgspec.Struct, frozen=True):
    """The parts of one response. `tool_calls` are ids."""

    text: str = ""
    tool_calls: tuple[str, ...] = ()
    id: str | None = None


def reply_of(response: Any) -> Reply:
    """The reply in a parsed response body of any of the four routes; empty for anything else."""
    if not isinstance(response, dict):
        return Reply()
    texts: list[str] = []
    calls: list[str] = []
    for choice in _list(response, "choices"):  # chat and completions
        message = choice.get("message")
        if isinstance(message, dict):
            texts.append(text_of(message))
            calls += [str(call["id"]) for call in _list(message, "tool_calls") if call.get("id")]
        elif isinstance(choice.get("text"), str):
            texts.append(choice["text"])
    for item in _list(response, "output"):  # responses
        if item.get("type") == "reasoning":
            continue
        texts.append(text_of(item))
        if item.get("type") == "function_call" and item.get("call_id"):
            calls.append(str(item["call_id"]))
    if response.get("type") == "message":  # messages
        texts.append(text_of(response))
        calls += [
            str(block["id"])
            for block in _list(response, "content")
            if block.get("type") == "tool_use" and block.get("id")
        ]
    text = "\n".join(part for part in texts if part)
    identity = response.get("id")
    return Reply(text[:MAX_TEXT_CHARS], tuple(calls), identity if isinstance(identity, str) else None)


def _list(holder: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = holder.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
