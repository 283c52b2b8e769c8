"""Session headers that agents, gateways and tracers already send, as data.

They name a run, and may name the session or agent that spawned it (a *spawn* edge); they never say which reply
a prompt was made from, so they never give a *data* edge. To teach the proxy a new client, add a row to `TABLE`
and a recorded request to ``tests/workflow/fixtures/native``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """Which header of one client says what. Names in lower case; the first row whose `session` is there wins."""

    client: str
    session: str
    """Names the run."""
    parent_session: str | None = None
    """Names the run that spawned this one; both are then one run."""
    agent: str | None = None
    """Names one agent (thread, span) within the session."""
    parent_agent: str | None = None
    """Names the agent of the same session that spawned this one."""
    workflow: str | None = None
    final: str | None = None
    path: str | None = None
    """A path such as ``/plan/search``: the agent; by its last part the node, by the rest the agent's spawner."""


TABLE: tuple[Row, ...] = (
    Row(
        "claude-code",
        session="x-claude-code-session-id",
        agent="x-claude-code-agent-id",
        parent_agent="x-claude-code-parent-agent-id",
    ),
    Row("codex", session="session-id", agent="thread-id", parent_agent="x-codex-parent-thread-id"),
    Row("codex", session="session_id", agent="conversation_id", parent_agent="x-codex-parent-thread-id"),
    Row("opencode", session="x-session-id", parent_session="x-parent-session-id"),
    Row(
        "dynamo",
        session="x-dynamo-session-id",
        parent_session="x-dynamo-parent-session-id",
        final="x-dynamo-session-final",
    ),
    Row(
        "helicone",
        session="helicone-session-id",
        path="helicone-session-path",
        workflow="helicone-session-name",
    ),
    Row(
        "portkey",
        session="x-portkey-trace-id",
        agent="x-portkey-span-id",
        parent_agent="x-portkey-parent-span-id",
    ),
    Row("litellm", session="x-litellm-session-id"),
    Row("litellm", session="x-litellm-trace-id"),
)

GENERIC_SUFFIX = "-session-id"
"""Any ``x-*-session-id`` that no row knows names a run too."""

KNOWN = frozenset(
    name
    for row in TABLE
    for name in (
        row.session,
        row.parent_session,
        row.agent,
        row.parent_agent,
        row.workflow,
        row.final,
        row.path,
    )
    if name
)


@dataclass(frozen=True, slots=True)
class Session:
    """What native headers said of a call. Everything is the client's own name for it."""

    client: str
    session: str
    parent_session: str | None = None
    agent: str | None = None
    parent_agent: str | None = None
    workflow: str | None = None
    node: str | None = None
    final: bool = False


def read(headers: Mapping[str, str]) -> Session | None:
    """The session named by `headers` (a plain dict with lower-case names), or None.

    A W3C ``traceparent`` is the last resort: its trace id groups calls that say nothing else.
    """
    for row in TABLE:
        if row.session in headers and (session := headers[row.session].strip()):
            return _by_row(row, session, headers)
    for name, value in headers.items():
        if name.startswith("x-") and name.endswith(GENERIC_SUFFIX) and value.strip():
            return Session(name[2 : -len(GENERIC_SUFFIX)], value.strip())
    if (trace := headers.get("traceparent")) is not None:
        parts = trace.split("-")
        if len(parts) >= 4 and len(parts[1]) == 32 and parts[1].strip("0"):
            return Session("traceparent", parts[1])
    return None


def _by_row(row: Row, session: str, headers: Mapping[str, str]) -> Session:
    def get(name: str | None) -> str | None:
        return (headers.get(name, "").strip() or None) if name else None

    agent, parent_agent, node = get(row.agent), get(row.parent_agent), None
    if (path := get(row.path)) is not None:
        agent = path.rstrip("/") or "/"
        before, _, node = agent.rpartition("/")
        parent_agent = before or None
    return Session(
        client=row.client,
        session=session,
        parent_session=get(row.parent_session),
        agent=agent,
        parent_agent=parent_agent,
        workflow=get(row.workflow),
        node=node or None,
        final=(get(row.final) or "").lower() in ("1", "true", "yes"),
    )
