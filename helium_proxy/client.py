"""Tagging made short: name the workflow, run and node once, and every LLM call made inside says so.

    from helium_proxy.client import node, openai_http_client, workflow

    client = OpenAI(base_url="http://localhost:8080/v1", http_client=openai_http_client())
    with workflow("trading", run="2025-03-11"):
        with node("bull", parents=["news", "technical"]):
            client.chat.completions.create(...)

The names travel in headers (`headers()`), put there by an event hook of the HTTP client, so that code between the
``with`` and the call needs no change. They are kept in context variables: asyncio tasks inherit them, threads do when
started with ``contextvars.copy_context().run`` (LangGraph does so itself). Needs the standard library and httpx only;
what a framework needs is imported when asked for.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    import httpx

__all__ = [
    "Tags",
    "async_event_hooks",
    "async_http_client",
    "event_hooks",
    "headers",
    "http_client",
    "langchain_clients",
    "node",
    "openai_async_http_client",
    "openai_http_client",
    "set_final",
    "use_in_openai_agents",
    "workflow",
]


@dataclass(frozen=True, slots=True)
class Tags:
    """The names in force at one place of a program."""

    workflow: str | None = None
    run: str | None = None
    node: str | None = None
    parents: tuple[str, ...] | None = None
    """None: let the proxy infer them; empty: a root."""
    final: bool = False
    deadline_ms: float | None = None
    priority: int | None = None


_current: ContextVar[Tags] = ContextVar("helium_tags", default=Tags())  # noqa: B039 - immutable


@contextmanager
def workflow(
    name: str, run: str | None = None, *, priority: int | None = None, deadline_ms: float | None = None
) -> Iterator[str]:
    """Calls inside belong to one run of workflow `name`; yields the run's id, a new one unless given."""
    run = run or uuid.uuid4().hex
    token = _current.set(Tags(workflow=_checked(name), run=_checked(run), priority=priority, deadline_ms=deadline_ms))
    try:
        yield run
    finally:
        _current.reset(token)


@contextmanager
def node(
    name: str,
    parents: Sequence[str] | None = None,
    *,
    final: bool = False,
    priority: int | None = None,
    deadline_ms: float | None = None,
) -> Iterator[None]:
    """Calls inside are node `name`.

    `parents`: node names or response ids whose replies its prompt is made from; empty for a root; None to let the
    proxy infer them. `final`: the run ends with this call.
    """
    above = _current.get()
    token = _current.set(
        replace(
            above,
            node=_checked(name),
            parents=None if parents is None else tuple(_checked(parent) for parent in parents),
            final=final,
            priority=above.priority if priority is None else priority,
            deadline_ms=above.deadline_ms if deadline_ms is None else deadline_ms,
        )
    )
    try:
        yield
    finally:
        _current.reset(token)


def set_final() -> None:
    """Say that the run ends with the next call made here (where that is known only late)."""
    _current.set(replace(_current.get(), final=True))


def _checked(name: str) -> str:
    if not name.strip() or "," in name or len(name) > 128 or any(char < " " or char == "\x7f" for char in name):
        raise ValueError(f"{name!r} must have 1 to 128 characters, none of them a comma or a control character")
    return name


def headers() -> dict[str, str]:
    """The headers that say what is in force here; empty outside `workflow` and `node`.

    Names that are not ASCII travel percent-encoded in ``baggage``, as W3C has it.
    """
    tags = _current.get()
    values: dict[str, str | None] = {
        "workflow": tags.workflow,
        "run": tags.run,
        "node": tags.node,
        "parents": None if tags.parents is None else ",".join(tags.parents),
        "final": "true" if tags.final else None,
        "deadline-ms": None if tags.deadline_ms is None else f"{tags.deadline_ms:g}",
        "priority": None if tags.priority is None else str(tags.priority),
    }
    out: dict[str, str] = {}
    members = []
    for name, value in values.items():
        if value is None:
            continue
        if value.isascii():
            out[f"X-Helium-{name.title()}"] = value
        else:
            members.append(f"helium.{name.replace('-', '_')}={quote(value, safe='')}")
    if members:
        out["baggage"] = ",".join(members)
    return out


def _stamp(request: Any) -> None:
    for name, value in headers().items():
        if name == "baggage" and "baggage" in request.headers:
            request.headers[name] = f"{request.headers[name]},{value}"
        elif name not in request.headers:  # what a call says of itself wins
            request.headers[name] = value


async def _stamp_async(request: Any) -> None:
    _stamp(request)


def event_hooks() -> dict[str, list[Callable[..., Any]]]:
    """For ``httpx.Client(event_hooks=…)``, or httpx2's."""
    return {"request": [_stamp]}


def async_event_hooks() -> dict[str, list[Callable[..., Any]]]:
    """For ``httpx.AsyncClient(event_hooks=…)``, or httpx2's."""
    return {"request": [_stamp_async]}


def http_client(**options: Any) -> httpx.Client:
    """An httpx client that stamps its requests; `options` as `httpx.Client` takes them."""
    import httpx

    return httpx.Client(event_hooks=event_hooks(), **options)


def async_http_client(**options: Any) -> httpx.AsyncClient:
    """The same, asynchronous."""
    import httpx

    return httpx.AsyncClient(event_hooks=async_event_hooks(), **options)


def openai_http_client(**options: Any) -> Any:
    """For ``OpenAI(http_client=…)``: openai-python's own default client (timeouts, limits) with the stamp."""
    import openai

    return openai.DefaultHttpxClient(event_hooks=event_hooks(), **options)


def openai_async_http_client(**options: Any) -> Any:
    """For ``AsyncOpenAI(http_client=…)``, and for what is built on it (openai-agents, pydantic-ai)."""
    import openai

    return openai.DefaultAsyncHttpxClient(event_hooks=async_event_hooks(), **options)


def langchain_clients(**options: Any) -> Mapping[str, Any]:
    """For ``ChatOpenAI(**langchain_clients())``: both clients, so that nodes of a LangGraph may be of either kind."""
    return {
        "http_client": openai_http_client(**options),
        "http_async_client": openai_async_http_client(**options),
    }


def use_in_openai_agents(**options: Any) -> Any:
    """Make the openai-agents SDK stamp its calls: sets its default client to an `AsyncOpenAI` (returned) made with
    `options`. Its tracing exporter, which would send the prompts to api.openai.com, is left as it is."""
    import openai

    agents = import_module("agents")
    client = openai.AsyncOpenAI(http_client=openai_async_http_client(), **options)
    agents.set_default_openai_client(client, use_for_tracing=False)
    return client
