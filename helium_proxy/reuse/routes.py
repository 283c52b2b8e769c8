"""The API families, as far as reuse tells them apart: each has its own JSON and its own stream."""

from __future__ import annotations

from enum import Enum

from helium_proxy.types import POOLED_ROUTES


class Family(Enum):
    """Which form an answer has."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    POOLING = "pooling"
    """Embeddings and scores: one JSON body, never a stream, no sampling."""
    OTHER = "other"

    @property
    def streams(self) -> bool:
        return self not in (Family.POOLING, Family.OTHER)


_FAMILIES = {  # the routes whose calls are queued and placed; all others pass straight through
    "/v1/chat/completions": Family.CHAT,
    "/v1/completions": Family.COMPLETIONS,
    "/v1/responses": Family.RESPONSES,
    "/v1/messages": Family.MESSAGES,
    **dict.fromkeys(POOLED_ROUTES, Family.POOLING),
}


def family(route: str) -> Family:
    """The family of a path; `Family.OTHER` for one whose answers are never reused."""
    return _FAMILIES.get(route) or _FAMILIES.get(route.rstrip("/"), Family.OTHER)
