"""OpenTelemetry spans: a run is a trace, a call a span with its queue, plan and upstream parts as children.

A client's own ``traceparent`` wins: its trace holds the call. Without one, the trace id follows from the run, so that
all calls of a run, from any process, meet in one trace under one root span. The worker is given the call's
``traceparent`` either way, and vLLM's own spans continue it.

Without the extra ``otel``, or switched off, `make_tracer` gives a `NullTracer`: it costs nothing, and a client's
``traceparent`` still reaches the worker.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

from helium_proxy.errors import ConfigError
from helium_proxy.types import Arrival, Outcome

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
_MAX_RUNS = 4096


class CallTrace(Protocol):
    """One call's span."""

    def event(self, name: str, start: float, end: float) -> None:
        """A part of the call, ``queue``, ``plan`` or ``upstream``: monotonic seconds, as every `now`."""

    def end(self, outcome: Outcome) -> None:
        """The call is over; later events and ends are ignored."""

    def traceparent(self) -> str | None:
        """The header to send to the worker; None: none."""


class Tracer(Protocol):
    """What the gateway holds."""

    def call(self, arrival: Arrival, request_headers: Mapping[str, str], now: float | None = None) -> CallTrace:
        """A span for a call that arrived at `now` (None: just so). Header names in lower case."""

    def end_run(self, run: str) -> None:
        """The run has ended; unknown runs are ignored."""

    def close(self) -> None:
        """End and send what is open."""


class _NullCall:
    __slots__ = ("_traceparent",)

    def __init__(self, traceparent: str | None) -> None:
        self._traceparent = traceparent

    def event(self, name: str, start: float, end: float) -> None:
        pass

    def end(self, outcome: Outcome) -> None:
        pass

    def traceparent(self) -> str | None:
        return self._traceparent


class NullTracer:
    """Traces nothing; a client's valid ``traceparent`` is handed on as it is."""

    def call(self, arrival: Arrival, request_headers: Mapping[str, str], now: float | None = None) -> CallTrace:
        given = request_headers.get("traceparent")
        return _NullCall(given if given is not None and _TRACEPARENT.fullmatch(given) else None)

    def end_run(self, run: str) -> None:
        pass

    def close(self) -> None:
        pass


def make_tracer(*, enabled: bool, service_name: str = "helium-proxy", endpoint: str | None = None) -> Tracer:
    """The tracer that the settings ask for: OTLP over HTTP to `endpoint` or to what ``OTEL_EXPORTER_OTLP_…`` says.

    Raises:
        ConfigError: tracing is asked for, but the extra ``otel`` is not installed.
    """
    if not enabled:
        return NullTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("tracing.enabled needs the extra: pip install '.[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OtelTracer(provider)


def run_name(tenant: str, run: str) -> str:
    """A run's name among those of all tenants."""
    return f"{tenant}/{run}" if tenant else run


def run_ids(run: str) -> tuple[int, int]:
    """(trace id, root span id) of a run: the same in every process, never 0."""
    digest = hashlib.blake2b(run.encode(), digest_size=24, person=b"helium-run").digest()
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:]) or 1


class OtelTracer:
    """Spans by OpenTelemetry's SDK. `clock` is the monotonic clock of every `now`, `wall_ns` Unix nanoseconds.

    State is one open root span per run that has no trace of its client's, bounded: the oldest is ended.
    """

    def __init__(
        self,
        provider: TracerProvider,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
        max_runs: int = _MAX_RUNS,
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider
        self._ids = _Ids(provider.id_generator)
        provider.id_generator = cast(Any, self._ids)
        self._tracer = provider.get_tracer("helium_proxy")
        self._clock = clock
        self._offset_ns = wall_ns() - int(clock() * 1e9)
        self._max_runs = max_runs
        # -- state: run (`run_name`) → its root span, oldest first
        self._roots: OrderedDict[str, Span] = OrderedDict()

    def __repr__(self) -> str:
        return f"<OtelTracer {len(self._roots)} runs open>"

    def at(self, now: float) -> int:
        """`now` as Unix nanoseconds."""
        return int(now * 1e9) + self._offset_ns

    def call(self, arrival: Arrival, request_headers: Mapping[str, str], now: float | None = None) -> CallTrace:
        start = self.at(self._clock() if now is None else now)
        given = request_headers.get("traceparent")
        if given is not None and _TRACEPARENT.fullmatch(given):
            parent = self._propagator.extract(dict(request_headers))
        else:
            parent = self._api.set_span_in_context(self._root(arrival, start))
        span = self._tracer.start_span(
            f"call {arrival.node.split('#', 1)[0]}",
            parent,
            kind=self._api.SpanKind.SERVER,
            start_time=start,
            attributes={
                "helium.run": arrival.run,
                "helium.workflow": arrival.workflow,
                "helium.node": arrival.node,
                "helium.call": arrival.call,
            },
        )
        return _Call(self, span)

    def _root(self, arrival: Arrival, start: int) -> Span:
        name = run_name(arrival.tenant, arrival.run)
        root = self._roots.get(name)
        if root is not None:
            return root
        while len(self._roots) >= self._max_runs:
            self._roots.popitem(last=False)[1].end()
        from opentelemetry.context import Context

        with self._ids.fixed(*run_ids(name)):
            root = self._tracer.start_span(
                f"run {arrival.workflow}",
                Context(),
                start_time=start,
                attributes={"helium.run": arrival.run, "helium.workflow": arrival.workflow},
            )
        self._roots[name] = root
        return root

    def end_run(self, run: str) -> None:
        root = self._roots.pop(run, None)
        if root is not None:
            root.end(self.at(self._clock()))

    def close(self) -> None:
        for run in list(self._roots):
            self.end_run(run)
        self._provider.shutdown()

    # -- for `_Call`

    def child(self, parent: Span, name: str, start: float, end: float) -> None:
        client = self._api.SpanKind.CLIENT if name == "upstream" else self._api.SpanKind.INTERNAL
        context: Context = self._api.set_span_in_context(parent)
        self._tracer.start_span(name, context, kind=client, start_time=self.at(start)).end(self.at(end))

    def header(self, span: Span) -> str | None:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(span))
        return carrier.get("traceparent")

    def finish(self, span: Span, outcome: Outcome) -> None:
        facts: dict[str, Any] = {
            "helium.fate": outcome.fate,
            "helium.worker": outcome.worker,
            "http.response.status_code": outcome.status,
            "gen_ai.usage.input_tokens": outcome.prompt_tokens,
            "gen_ai.usage.output_tokens": outcome.output_tokens,
            "helium.cached_tokens": outcome.cached_tokens,
            "helium.predicted_cached_tokens": outcome.predicted_cached_tokens,
        }
        span.set_attributes({name: value for name, value in facts.items() if value is not None})
        if outcome.fate == "error":
            span.set_status(self._api.StatusCode.ERROR, f"HTTP {outcome.status}")
        if outcome.first_token_at is not None:
            span.add_event("first token", timestamp=self.at(outcome.first_token_at))
        span.end(self.at(outcome.finished_at) if outcome.finished_at else self.at(self._clock()))


class _Call:
    __slots__ = ("_ended", "_span", "_tracer")

    def __init__(self, tracer: OtelTracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._ended = False

    def event(self, name: str, start: float, end: float) -> None:
        if not self._ended:
            self._tracer.child(self._span, name, start, max(start, end))

    def end(self, outcome: Outcome) -> None:
        if not self._ended:
            self._ended = True
            self._tracer.finish(self._span, outcome)

    def traceparent(self) -> str | None:
        return self._tracer.header(self._span)


class _Ids:
    """The SDK's id generator, with ids given beforehand for a run's root span."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        # -- state: (trace id, span id) of the next root; None: random ones
        self._next: tuple[int, int] | None = None

    @contextmanager
    def fixed(self, trace_id: int, span_id: int) -> Iterator[None]:
        self._next = (trace_id, span_id)
        try:
            yield
        finally:
            self._next = None

    def generate_trace_id(self) -> int:
        return self._next[0] if self._next is not None else int(self._inner.generate_trace_id())

    def generate_span_id(self) -> int:
        return self._next[1] if self._next is not None else int(self._inner.generate_span_id())

    def is_trace_id_random(self) -> bool:
        return self._next is None
