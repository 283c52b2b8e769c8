"""What a response says that later prompts may repeat: text, tool calls and their arguments, its id.

`Outcome.reply_text` should be `Reply.text`: the assistant's text *and* the arguments of its tool calls, since
an agent used as a tool gets its prompt from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class StreamedReply:
    """Gathers the same from a stream's parsed events, fed one by one in order."""

    _texts: list[str] = field(default_factory=list)
    _arguments: dict[Any, list[str]] = field(default_factory=dict)
    _calls: dict[str, None] = field(default_factory=dict)
    _id: str | None = None
    _whole: Reply | None = None
    _chars: int = 0

    def feed(self, event: Any) -> None:
        """Take one SSE event's JSON (chat, completions, responses or messages)."""
        if not isinstance(event, dict):
            return
        choices = event.get("choices")
        if isinstance(choices, list):
            if self._id is None and isinstance(event.get("id"), str):
                self._id = event["id"]
            for choice in choices:
                if isinstance(choice, dict):
                    self._choice(choice)
            return
        kind = event.get("type")
        if kind in ("response.completed", "response.incomplete"):
            self._whole = reply_of(event.get("response"))
        elif kind == "message_start" and isinstance(message := event.get("message"), dict):
            self._id = str(message.get("id"))
        elif kind == "content_block_start" and isinstance(block := event.get("content_block"), dict):
            if block.get("type") == "tool_use" and block.get("id"):
                self._calls[str(block["id"])] = None
        elif kind == "content_block_delta" and isinstance(delta := event.get("delta"), dict):
            self._text(delta.get("text"))
            self._argument(event.get("index"), delta.get("partial_json"))

    def _choice(self, choice: Mapping[str, Any]) -> None:
        self._text(choice.get("text"))
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return
        self._text(delta.get("content"))
        for call in _list(delta, "tool_calls"):
            if call.get("id"):
                self._calls[str(call["id"])] = None
            if isinstance(function := call.get("function"), dict):
                self._argument((choice.get("index"), call.get("index")), function.get("arguments"))

    def _text(self, text: Any) -> None:
        if isinstance(text, str) and self._chars < MAX_TEXT_CHARS:
            self._chars += len(text)
            self._texts.append(text)

    def _argument(self, at: Any, text: Any) -> None:
        if isinstance(text, str) and text and self._chars < MAX_TEXT_CHARS:
            self._chars += len(text)
            self._arguments.setdefault(at, []).append(text)

    def reply(self) -> Reply:
        """The reply so far."""
        if self._whole is not None:
            return self._whole
        parts = ["".join(self._texts), *("".join(part) for part in self._arguments.values())]
        return Reply("\n".join(part for part in parts if part), tuple(self._calls), self._id)
