"""What an answer says of itself: text and tool calls, and the tokens it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from helium_proxy.workflow import reply_of

_MAX_TEXT = 200_000


class Reply(msgspec.Struct, frozen=True):
    """Token counts are None where the answer has none; `text` is the assistant's, cut at 200,000 characters."""

    id: str | None = None
    text: str | None = None
    tool_calls: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    directive: Mapping[str, Any] | None = None
    """The worker's word on a directive (`kv_transfer_params.helium`)."""


def read_reply(answer: Any) -> Reply:
    """The facts of a non-stream answer; an empty `Reply` for what is not understood. Never raises."""
    try:
        return _read(answer)
    except Exception:  # an answer in a form of its own costs its numbers, never the answer
        return Reply()


def _read(answer: dict[str, Any]) -> Reply:
    said = reply_of(answer)
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    transfer = answer.get("kv_transfer_params")
    return Reply(
        id=answer.get("id"),
        text=said.text[:_MAX_TEXT] if said.text else None,
        tool_calls=said.tool_calls,
        prompt_tokens=_first(usage, "prompt_tokens", "input_tokens"),
        cached_tokens=_first(details, "cached_tokens") if details else _first(usage, "cache_read_input_tokens"),
        output_tokens=_first(usage, "completion_tokens", "output_tokens"),
        directive=transfer.get("helium") if isinstance(transfer, dict) else None,
    )


def _first(fields: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int):
            return value
    return None
