"""One call on its way through the proxy: what was asked, by whom, and what happened when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helium_proxy.gateway.bodies import encoded, extended, stripped
from helium_proxy.gateway.prewarm import Source
from helium_proxy.gateway.tracing import CallTrace
from helium_proxy.reuse import CacheControl
from helium_proxy.types import Arrival, CallRequest, Hints

_USAGE_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions"})
_PROMPTS = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/messages": "messages",
}


@dataclass(slots=True)
class Ticket:
    """A call and its notes. Times are seconds on the monotonic clock."""

    request: CallRequest
    raw: bytes
    """The body as it came."""
    path: str
    """The path with its query, as it is sent on."""
    headers: Mapping[str, str]
    """What is sent to the worker, apart from its own key."""
    arrived_at: float
    request_id: str = ""
    """The request id as the client said it; several calls may have it."""
    arrival: Arrival | None = None
    hints: Hints = field(default_factory=Hints)
    prefer: str | None = None
    """The worker that holds what the call continues: it goes there and nowhere else."""
    suggestion: str | None = None
    """The worker a submitted plan has placed it on."""
    previous: str | None = None
    """The id under which the worker knows the response that the body's `previous_response_id` names, if another."""
    control: CacheControl = field(default_factory=CacheControl)
    key: bytes | None = None
    """In the prompt cache and among calls in flight; None: not deterministic, or not to be reused."""
    salt: str = ""
    """The tenant's `cache_salt`, with the client's own in it; empty: blocks are shared."""
    # -- notes
    planned_at: float = 0.0
    started_at: float | None = None
    """When it was sent to its worker."""
    head_at: float | None = None
    """When the first byte of the answer came."""
    worker: str | None = None
    attempts: int = 0
    trace: CallTrace | None = None
    source: Source | None = None

    @property
    def stream(self) -> bool:
        return self.request.body.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether the client asked for the usage chunk of a stream."""
        options = self.request.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    @property
    def adds_usage(self) -> bool:
        """Whether we ask for it in the client's stead, and leave the chunk out again: only where the client's options
        say nothing else (with `continuous_usage_stats` every chunk would change, and bad options are the engine's
        to refuse) and there is one choice (of several, each one's last event would have to wait for the end)."""
        body = self.request.body
        prompt = body.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and not isinstance(next(iter(prompt), 0), int) else 1
        if body.get("n") not in (None, 1) or prompts != 1:
            return False
        options = self.request.body.get("stream_options")
        plain = options in (None, {}, {"include_usage": False}, {"include_usage": None})
        return self.stream and plain and self.request.route in _USAGE_ROUTES

    @property
    def tells_usage(self) -> bool:
        """Whether the answer will say what it took; else it is no answer to those who ask for that."""
        return not self.stream or self.wants_usage or self.adds_usage or self.request.route not in _USAGE_ROUTES

    @property
    def plain(self) -> bool:
        """Whether the answer's form is one we know, so that equal calls may share it."""
        stream, options = self.request.body.get("stream"), self.request.body.get("stream_options")
        if options is None:
            return stream is None or isinstance(stream, bool)
        return self.stream and options in ({}, {"include_usage": True}, {"include_usage": False})

    @property
    def node(self) -> str:
        return self.arrival.node.split("#", 1)[0] if self.arrival else "none"

    @property
    def workflow(self) -> str:
        return self.arrival.workflow if self.arrival else "none"


def payload(ticket: Ticket, additions: Mapping[str, Any]) -> bytes:
    """The body for the worker: the client's without Helium's own fields, with `additions` (top-level fields; a
    client's field of the same name stays, but objects are merged).

    Where nothing has to go, additions are put at the end of the bytes as they came.
    """
    body, changed = stripped(ticket.request.body)
    if (prompt := _PROMPTS.get(ticket.request.route)) is not None and prompt not in body:
        # The engine will refuse it, and say what it got.
        return encoded(body, ticket.raw) if changed else ticket.raw
    new = {name: value for name, value in additions.items() if name not in body}
    merged: dict[str, Any] = {
        name: {**body[name], **value}
        for name, value in additions.items()
        if isinstance(value, dict) and isinstance(body.get(name), dict)
    }
    if ticket.salt and "cache_salt" in body and isinstance(body["cache_salt"], str | None):
        merged["cache_salt"] = ticket.salt  # the client's is in it; what is no text, the engine refuses
    if ticket.previous is not None:
        merged["previous_response_id"] = ticket.previous
    if ticket.request.route == "/v1/responses" and "request_id" not in body:
        new["request_id"] = ticket.request.id  # the id under which the engine stores the response
    if ticket.adds_usage:
        options = body.get("stream_options")
        (merged if "stream_options" in body else new)["stream_options"] = {**(options or {}), "include_usage": True}
    if changed or merged:
        return encoded({**body, **merged, **new}, ticket.raw)
    return extended(ticket.raw, body, new)
