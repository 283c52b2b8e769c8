"""Spans, as OpenTelemetry's in-memory exporter receives them."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Stack, until

from helium_proxy.errors import ConfigError
from helium_proxy.gateway.tracing import NullTracer, OtelTracer, make_tracer, run_ids
from helium_proxy.types import Arrival, Outcome

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WALL = 1_700_000_000_000_000_000


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Traced:
    """A tracer on a clock of the test's, and the spans it has exported."""

    def __init__(self, *, real: bool = False, **options: Any) -> None:
        sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otel is not installed")
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.exporter = InMemorySpanExporter()
        provider = sdk.TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.clock = Clock()
        if not real:
            options |= {"clock": self.clock, "wall_ns": lambda: WALL}
        self.tracer = OtelTracer(provider, **options)

    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def traced() -> Iterator[Traced]:
    made = Traced()
    yield made
    made.tracer.close()


def arrival(node: str = "bull", run: str = "r1", call: str = "c1") -> Arrival:
    return Arrival(call=call, run=run, workflow="trading", node=node, template="trading")


def test_a_run_is_a_trace_and_a_call_a_span_with_its_parts(traced: Traced) -> None:
    call = traced.tracer.call(arrival("bull#2"), {})
    call.event("plan", 100.0, 100.001)
    call.event("queue", 100.001, 100.2)
    call.event("upstream", 100.2, 101.0)
    call.end(Outcome("computed", "w:8000", 200, 100, 64, 48, 12, 100.0, 100.2, 100.5, 101.0))
    traced.clock.now = 102.0
    traced.tracer.end_run("r1")
    spans = traced.spans()
    assert set(spans) == {"run trading", "call bull", "plan", "queue", "upstream"}
    trace_id, root_id = run_ids("r1")
    assert {span.context.trace_id for span in spans.values()} == {trace_id}
    assert spans["run trading"].context.span_id == root_id
    assert spans["run trading"].parent is None
    assert spans["call bull"].parent.span_id == root_id
    for part in ("plan", "queue", "upstream"):
        assert spans[part].parent.span_id == spans["call bull"].context.span_id
    assert (spans["queue"].start_time, spans["queue"].end_time) == (WALL + 1_000_000, WALL + 200_000_000)
    assert spans["call bull"].end_time == WALL + 1_000_000_000
    assert spans["run trading"].end_time == WALL + 2_000_000_000
    facts = spans["call bull"].attributes
    assert facts["helium.node"] == "bull#2"
    assert (facts["helium.fate"], facts["helium.worker"]) == ("computed", "w:8000")
    assert (facts["gen_ai.usage.input_tokens"], facts["helium.cached_tokens"]) == (100, 64)
    assert spans["call bull"].events[0].timestamp == WALL + 500_000_000


def test_calls_of_one_run_from_two_processes_meet_in_one_trace() -> None:
    one, two = Traced(), Traced()
    for made, node in ((one, "bull"), (two, "bear")):
        made.tracer.call(arrival(node), {}).end(Outcome("computed"))
    bull, bear = one.spans()["call bull"], two.spans()["call bear"]
    assert bull.context.trace_id == bear.context.trace_id
    assert bull.parent.span_id == bear.parent.span_id
    assert bull.context.span_id != bear.context.span_id


def test_the_clients_trace_is_continued_and_the_workers_header_names_the_call(traced: Traced) -> None:
    call = traced.tracer.call(arrival(), {"traceparent": CLIENT})
    header = call.traceparent()
    call.end(Outcome("computed"))
    span = traced.spans()["call bull"]
    assert f"{span.context.trace_id:032x}" == CLIENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == CLIENT.split("-")[2]
    assert header == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"
    assert "run trading" not in traced.spans(), "the client's own root is the run's"


@pytest.mark.parametrize(
    "bad", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", CLIENT[:-1], "x" * 10_000]
)
def test_a_bad_traceparent_is_as_none(traced: Traced, bad: str) -> None:
    call = traced.tracer.call(arrival(), {"traceparent": bad})
    assert (call.traceparent() or "").split("-")[1] == f"{run_ids('r1')[0]:032x}"
    assert NullTracer().call(arrival(), {"traceparent": bad}).traceparent() is None


def test_an_error_is_one(traced: Traced) -> None:
    traced.tracer.call(arrival(), {}).end(Outcome("error", status=502))
    span = traced.spans()["call bull"]
    assert span.status.status_code.name == "ERROR"
    assert span.attributes["http.response.status_code"] == 502


def test_after_its_end_a_call_takes_nothing_more(traced: Traced) -> None:
    call = traced.tracer.call(arrival(), {})
    call.end(Outcome("hit"))
    call.event("upstream", 100.0, 101.0)
    call.end(Outcome("error"))
    assert set(traced.spans()) == {"call bull"}
    assert traced.spans()["call bull"].attributes["helium.fate"] == "hit"


def test_open_runs_are_bounded() -> None:
    traced = Traced(max_runs=3)
    for number in range(5):
        traced.tracer.call(arrival(run=f"r{number}"), {}).end(Outcome("computed"))
    roots = [span for span in traced.exporter.get_finished_spans() if span.name == "run trading"]
    assert [span.attributes["helium.run"] for span in roots] == ["r0", "r1"]
    assert repr(traced.tracer) == "<OtelTracer 3 runs open>"
    traced.tracer.end_run("never seen")
    traced.tracer.close()
    assert repr(traced.tracer) == "<OtelTracer 0 runs open>"


def test_switched_off_it_only_hands_on_the_clients_header() -> None:
    tracer = make_tracer(enabled=False)
    assert isinstance(tracer, NullTracer)
    call = tracer.call(arrival(), {"traceparent": CLIENT})
    call.event("queue", 0.0, 1.0)
    call.end(Outcome("computed"))
    assert call.traceparent() == CLIENT
    assert tracer.call(arrival(), {}).traceparent() is None
    tracer.end_run("r1")
    tracer.close()


def test_switched_on_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install .*\[otel\]"):
        make_tracer(enabled=True)


def test_switched_on_it_sends_to_the_endpoint() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    tracer = make_tracer(enabled=True, endpoint="http://127.0.0.1:9/v1/traces")
    assert isinstance(tracer, OtelTracer)
    assert tracer.call(arrival(), {}).traceparent() is not None


async def test_through_the_proxy_a_call_is_traced_and_the_worker_gets_its_header(stack: Stack) -> None:
    traced = Traced(real=True)
    worker = await stack.fake()
    proxy = await stack.proxy(worker)
    proxy.services.tracer = traced.tracer
    tags = {"workflow": "trading", "run": "e2e", "node": "bull", "final": True}
    assert (await proxy.chat("hello", helium=tags)).status_code == 200
    sent = next(seen for seen in worker.seen if seen.path.endswith("/completions")).headers["traceparent"]
    await until(lambda: "run trading" in traced.spans(), what="the run's end")
    spans = traced.spans()
    assert set(spans) == {"run trading", "call bull", "plan", "queue", "upstream"}
    assert sent.split("-")[1:3] == [f"{run_ids('default/e2e')[0]:032x}", f"{spans['call bull'].context.span_id:016x}"]
    parts = [spans[name] for name in ("plan", "queue", "upstream")]
    assert [part.start_time for part in parts] == sorted(part.start_time for part in parts)
    assert spans["call bull"].start_time <= parts[0].start_time
