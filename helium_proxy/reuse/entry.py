"""One kept answer, in a form from which a reply with an id of its own is made without parsing."""

from __future__ import annotations

from typing import Any

import msgspec
import orjson

from helium_proxy.reuse.routes import Family, family

_OVERHEAD = 512
"""Bytes an entry costs beyond its strings: objects, the table's slot, the key."""

_OWN = ("id", "created", "created_at")
"""Fields of an answer that belong to one reply, not to the answer."""

_UNFINISHED = frozenset({None, "abort", "error"})


class Entry(msgspec.Struct, frozen=True):
    """A complete answer with status 200. `body` is its non-stream JSON without the fields in `own`."""

    body: bytes
    own: tuple[str, ...]
    """Which of ``id``, ``created``, ``created_at`` a reply of this kind carries."""
    route: str
    tenant: str
    model: str
    workflow: str
    created_at: float
    """When it was computed, Unix time in seconds."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """The original call's usage."""

    @property
    def size(self) -> int:
        """Bytes it is accounted with."""
        return len(self.body) + len(self.model) + len(self.workflow) + len(self.tenant) + _OVERHEAD

    def age(self, now: float) -> float:
        """Seconds since it was computed, never negative."""
        return max(0.0, now - self.created_at)

    def __repr__(self) -> str:
        return f"Entry({self.route}, {self.model}, {self.workflow or '-'}, {len(self.body)} B)"


def make_entry(
    answer: bytes | dict[str, Any], *, route: str, tenant: str, model: str, workflow: str = "", now: float
) -> Entry | None:
    """An entry of a non-stream answer with status 200, or None if the answer is an error, cut short or no JSON."""
    if isinstance(answer, bytes):
        try:
            answer = orjson.loads(answer)
        except orjson.JSONDecodeError:
            return None
    if not isinstance(answer, dict) or not _complete(answer, family(route)):
        return None
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    body = {k: None if k in _TRANSFER else v for k, v in answer.items() if k not in _OWN}
    return Entry(
        body=bytes(memoryview(orjson.dumps(body))),  # a copy: orjson's own bytes keep a buffer of at least 4 kB
        own=tuple(name for name in _OWN if name in answer),
        route=route,
        tenant=tenant,
        model=model,
        workflow=workflow,
        created_at=now,
        prompt_tokens=_first_int(usage, "prompt_tokens", "input_tokens"),
        output_tokens=_first_int(usage, "completion_tokens", "output_tokens"),
    )


_TRANSFER = ("kv_transfer_params", "ec_transfer_params")


def _complete(answer: dict[str, Any], kind: Family) -> bool:
    if answer.get("error") is not None or answer.get("object") == "error":
        return False
    match kind:
        case Family.CHAT | Family.COMPLETIONS:
            choices = answer.get("choices")
            return (
                isinstance(choices, list)
                and bool(choices)
                and all(isinstance(c, dict) and c.get("finish_reason") not in _UNFINISHED for c in choices)
            )
        case Family.RESPONSES:
            details = answer.get("incomplete_details")
            reason = details.get("reason") if isinstance(details, dict) else None
            return answer.get("status") == "completed" or (
                answer.get("status") == "incomplete" and reason == "max_output_tokens"
            )
        case Family.MESSAGES:
            return answer.get("type") == "message" and answer.get("stop_reason") not in _UNFINISHED
        case Family.POOLING:
            return True
        case Family.OTHER:
            return False


def _first_int(usage: dict[str, Any], *names: str) -> int | None:
    for name in names:
        if isinstance(value := usage.get(name), int):
            return value
    return None
