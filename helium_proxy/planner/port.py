"""The port through which a plan's calls leave: the gateway implements it over the same pipeline as live calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from helium_proxy.errors import UpstreamFailed
from helium_proxy.types import Fate, Hints


@dataclass(frozen=True, slots=True)
class CallResult:
    """The answer to one call, whatever became of it; `body` is OpenAI's, an error's included."""

    status: int
    body: Mapping[str, Any]
    fate: Fate = "computed"
    worker: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


class CallPort(Protocol):
    """Where an operator's call goes: the same pipeline as live calls. May raise `HeliumError`."""

    async def call(
        self,
        body: dict[str, Any],
        *,
        tenant: str,
        headers: Mapping[str, str],
        hints: Hints | None,
        worker: str | None,
    ) -> CallResult: ...


def reply_text(body: Mapping[str, Any]) -> str:
    """The text of a chat completion or completion. Raises `UpstreamFailed` when there is none to be found."""
    try:
        choice = body["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UpstreamFailed("the worker's answer has no choices") from None
    return text if isinstance(text, str) else ""
