"""What a request says of itself: Helium's tags, their aliases, and how they are removed again.

Precedence, field by field: body ``helium``, then its aliases in the body (``metadata["helium.*"]``,
``vllm_xargs.agentic_context``, ``nvext.agent_hints``), then ``X-Helium-*`` headers, then ``baggage``, then
native session headers (`native_headers`). The source of each value is kept; a lower source that says something
else is a conflict. Bad values are refused in strict mode and ignored, but counted, otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal
from urllib.parse import unquote

import msgspec
import orjson

from helium_proxy.errors import InvalidRequest
from helium_proxy.workflow import native_headers
from helium_proxy.workflow.native_headers import Session
from helium_proxy.workflow.settings import WorkflowSettings

Source = Literal["body", "header", "baggage", "native"]

FIELDS = ("workflow", "run", "node", "parents", "final", "deadline_ms", "priority")
_FIELDS = frozenset(FIELDS)
HEADERS: dict[str, str] = {f"x-helium-{name.replace('_', '-')}": name for name in FIELDS}
"""Header name → field."""
_INTERESTING = frozenset({*HEADERS, *native_headers.KNOWN, "baggage", "traceparent"})
_BAGGAGE = {f"helium.{name}": name for name in FIELDS}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # and lone surrogates, which nothing can encode
_MAX_DEADLINE_MS = 7 * 86_400_000.0
_INT32 = 2**31


class Tags(msgspec.Struct, frozen=True):
    """One request's tags after precedence and validation."""

    workflow: str | None = None
    run: str | None = None
    node: str | None = None
    parents: tuple[str, ...] | None = None
    """None: not said, infer them; empty: a root, infer nothing."""
    final: bool = False
    deadline_s: float | None = None
    priority: int | None = None
    output_tokens: float | None = None
    """A client's own expectation (`agentic_context`, `nvext`)."""
    spawned_by: str | None = None
    """A run that spawned this one (`parent_program_id`)."""
    session: Session | None = None
    sources: Mapping[str, Source] = msgspec.field(default_factory=dict)
    conflicts: tuple[str, ...] = ()
    """Fields that two sources gave differently."""
    ignored: tuple[str, ...] = ()
    """Fields whose value was bad."""


class _Reader:
    """Collects candidate values, best source first, and validates the winner of each field."""

    def __init__(self, settings: WorkflowSettings) -> None:
        self.settings = settings
        self.values: dict[str, Any] = {}
        self.sources: dict[str, Source] = {}
        self.conflicts: list[str] = []
        self.ignored: list[str] = []

    def unknown(self, names: Iterable[str]) -> None:
        """`names` are no fields; a typo, perhaps."""
        if self.settings.strict:
            name = min(names)
            near = get_close_matches(name, FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InvalidRequest(f"helium.{name[:64]}: no such tag{hint}", param=f"helium.{name[:64]}")
        self.ignored.append("unknown")

    def offer(self, name: str, raw: Any, source: Source) -> None:
        """Take `raw` for field `name` unless a better source has already given it."""
        if raw is None:
            return
        try:
            value = _PARSERS[name](raw, self.settings)
        except ValueError as error:
            if self.settings.strict:
                raise InvalidRequest(f"helium.{name}: {error}", param=f"helium.{name}") from None
            self.ignored.append(name)
            return
        if value is None:
            return
        if name not in self.sources:
            self.values[name] = value
            self.sources[name] = source
        elif value != self.values[name]:
            if self.settings.strict:
                raise InvalidRequest(
                    f"helium.{name}: {self.sources[name]} and {source} disagree", param=f"helium.{name}"
                )
            self.conflicts.append(name)


def _name(raw: Any, settings: WorkflowSettings) -> str | None:
    if isinstance(raw, int) and not isinstance(raw, bool):
        raw = str(raw)
    if not isinstance(raw, str):
        raise ValueError("must be a string")
    text = raw.strip()
    if len(text) > settings.max_tag_chars:
        raise ValueError(f"is longer than {settings.max_tag_chars} characters")
    if not text.isprintable() and _CONTROL.search(text):
        raise ValueError("has control characters")
    return text or None


def _parents(raw: Any, settings: WorkflowSettings) -> tuple[str, ...]:
    if isinstance(raw, str):
        raw = [part for part in raw.split(",") if part.strip()]
    if not isinstance(raw, list | tuple):
        raise ValueError("must be a list of node names or response ids")
    if len(raw) > settings.max_parents:
        raise ValueError(f"names more than {settings.max_parents} parents")
    if not raw:
        return ()
    names = [_name(item, settings) for item in raw]
    return tuple(dict.fromkeys(name for name in names if name))


def _flag(raw: Any, _: WorkflowSettings) -> bool:
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower()
    if text in ("true", "1", "yes"):
        return True
    if text in ("false", "0", "no", ""):
        return False
    raise ValueError("must be true or false")


def _number(raw: Any, low: float, high: float) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise ValueError("must be a number")
    try:
        value = float(raw)
    except ValueError:
        raise ValueError("must be a number") from None
    if not low <= value <= high:
        raise ValueError(f"must lie between {low:g} and {high:g}")
    return value


def _deadline(raw: Any, _: WorkflowSettings) -> float:
    value = _number(raw, 0.0, _MAX_DEADLINE_MS)
    if value == 0.0:
        raise ValueError("must be above 0")
    return value


def _priority(raw: Any, _: WorkflowSettings) -> int:
    value = _number(raw, -_INT32, _INT32 - 1)
    if value != int(value):
        raise ValueError("must be a whole number")
    return int(value)


def _tokens(raw: Any, _: WorkflowSettings) -> float:
    return _number(raw, 0.0, 1e7)


_PARSERS: dict[str, Callable[[Any, WorkflowSettings], Any]] = {
    "workflow": _name,
    "run": _name,
    "node": _name,
    "parents": _parents,
    "final": _flag,
    "deadline_ms": _deadline,
    "priority": _priority,
    "output_tokens": _tokens,
    "spawned_by": _name,
}


def _body_fields(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tags found in the body, best first."""
    own = body.get("helium")
    if isinstance(own, dict):
        yield from [(name, own[name]) for name in FIELDS if name in own]
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        yield from ((name, metadata.get(f"helium.{name}")) for name in FIELDS)
    xargs = body.get("vllm_xargs")
    if isinstance(xargs, dict):
        context = xargs.get("agentic_context")
        if isinstance(context, str) and len(context) <= 16_384:
            try:
                context = orjson.loads(context)
            except orjson.JSONDecodeError:
                context = None
        if isinstance(context, dict):
            yield "run", context.get("program_id")
            yield "node", context.get("agent_id")
            yield "spawned_by", context.get("parent_program_id")
            yield "priority", context.get("priority")
            yield "output_tokens", context.get("expected_output_length")
    nvext = body.get("nvext")
    if isinstance(nvext, dict) and isinstance(hints := nvext.get("agent_hints"), dict):
        yield "output_tokens", hints.get("osl")
        yield "priority", hints.get("priority")


def _baggage(value: str) -> Iterator[tuple[str, str]]:
    """`(field, value)` of the Helium members of a W3C ``baggage`` header."""
    for member in value.split(","):
        key, equals, rest = member.partition("=")
        name = _BAGGAGE.get(key.strip())
        if equals and name:
            yield name, unquote(rest.partition(";")[0].strip())


def read(body: Mapping[str, Any], headers: Mapping[str, str], settings: WorkflowSettings) -> Tags:
    """The tags of one request. Raises `InvalidRequest` in strict mode only."""
    suffix = native_headers.GENERIC_SUFFIX
    interesting: dict[str, str] = {}
    if suffix in ",".join(headers) or not _INTERESTING.isdisjoint(headers):
        interesting = {n: v for n, v in headers.items() if n in _INTERESTING or n.endswith(suffix)}
    has_body = "helium" in body or "metadata" in body or "vllm_xargs" in body or "nvext" in body
    if not interesting and not has_body:
        return _NO_TAGS
    reader = _Reader(settings)
    if has_body:
        own = body.get("helium")
        if own is not None and not isinstance(own, dict):
            if settings.strict:
                raise InvalidRequest("helium: must be an object", param="helium")
            reader.ignored.append("helium")
        elif own is not None and not own.keys() <= _FIELDS:
            reader.unknown(own.keys() - _FIELDS)
        for name, raw in _body_fields(body):
            reader.offer(name, raw, "body")
    session: Session | None = None
    if interesting:
        for header, name in HEADERS.items():
            if header in interesting:
                reader.offer(name, interesting[header], "header")
        for name, raw in _baggage(interesting.get("baggage", "")):
            reader.offer(name, raw, "baggage")
        if settings.native_headers:
            session = _session(interesting, settings, reader)
    values, sources = reader.values, reader.sources
    if session is not None:
        for name, value in (("workflow", session.workflow), ("node", session.node)):
            if value and name not in sources:
                values[name], sources[name] = value, "native"
    deadline_ms = values.get("deadline_ms")
    return Tags(
        workflow=values.get("workflow"),
        run=values.get("run"),
        node=values.get("node"),
        parents=values.get("parents"),
        final=values.get("final", session is not None and session.final),
        deadline_s=None if deadline_ms is None else deadline_ms / 1000.0,
        priority=values.get("priority"),
        output_tokens=values.get("output_tokens"),
        spawned_by=values.get("spawned_by"),
        session=session,
        sources=sources,
        conflicts=tuple(reader.conflicts),
        ignored=tuple(reader.ignored),
    )


_NO_TAGS = Tags()


def _session(headers: Mapping[str, str], settings: WorkflowSettings, reader: _Reader) -> Session | None:
    session = native_headers.read(headers)
    if session is None:
        return None
    for value in (
        session.session,
        session.parent_session,
        session.agent,
        session.parent_agent,
        session.workflow,
    ):
        if value is not None and (len(value) > settings.max_tag_chars or _CONTROL.search(value)):
            reader.ignored.append("session")
            return None
    return session


def strip_tags(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """`body` without Helium's own fields, and whether anything was removed.

    Removed: ``helium``; ``metadata["helium.*"]``; a client's own ``kv_transfer_params.helium`` (directives are
    the proxy's alone). A container that held nothing else goes with them. Everything else stays, and so does
    the object itself when there was nothing to remove.
    """
    changes: dict[str, dict[str, Any]] = {}
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        kept = {key: value for key, value in metadata.items() if not _is_ours(key)}
        if len(kept) != len(metadata):
            changes["metadata"] = kept
    transfer = body.get("kv_transfer_params")
    if isinstance(transfer, dict) and "helium" in transfer:
        changes["kv_transfer_params"] = {key: value for key, value in transfer.items() if key != "helium"}
    if not changes and "helium" not in body:
        return body, False
    out: dict[str, Any] = {}
    for key, value in body.items():
        if key == "helium":
            continue
        if key in changes:
            if changes[key]:
                out[key] = changes[key]
        else:
            out[key] = value
    return out, True


def _is_ours(key: Any) -> bool:
    return isinstance(key, str) and key.startswith("helium.")


def strip_headers(headers: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, str]:
    """`headers` (names in lower case) without ``x-helium-*`` and without Helium's baggage members."""
    items = headers.items() if isinstance(headers, Mapping) else headers
    out: dict[str, str] = {}
    for name, value in items:
        if name.startswith("x-helium-"):
            continue
        if name == "baggage" and "helium." in value:
            members = [part for part in value.split(",") if not part.strip().startswith("helium.")]
            if not members:
                continue
            value = ",".join(members).strip()  # noqa: PLW2901 - the header's value without our members
        out[name] = value
    return out
