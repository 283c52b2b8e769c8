"""Every Prometheus metric of the proxy, in one place; `docs/metrics.md` is checked against this file.

Label values that a client can influence (workflow, node, model) pass through `bounded`, which admits a fixed
number of distinct values per label and calls the rest ``other``: a client can never grow the registry. Under
``PROMETHEUS_MULTIPROC_DIR`` `render` uses prometheus-client's multi-process collector.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)
from prometheus_client.metrics import MetricWrapperBase

REGISTRY = CollectorRegistry(auto_describe=True)

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MICRO = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1)
_RATIO = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)
_TOKENS = (0, 1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class _Family(MetricWrapperBase):
    """A metric that finds a child again by one look-up. The library converts and checks the values under a lock each
    time, which on every call's path costs more than counting does."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # -- state: label values as they were given → child; as bounded as the children are
        self._found: dict[tuple[object, ...], Any] = {}
        super().__init__(*args, **options)

    def labels(self, *values: object, **named: object) -> Any:
        child = None if named else self._found.get(values)
        if child is None:
            child = super().labels(*values, **named)
            if not named:
                self._found[values] = child
        return child

    def remove(self, *values: Any) -> None:
        self._found.clear()
        super().remove(*values)

    def remove_by_labels(self, labels: dict[str, str]) -> None:
        self._found.clear()
        super().remove_by_labels(labels)

    def clear(self) -> None:
        self._found.clear()
        super().clear()


class _Counter(_Family, Counter):
    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        """As the library's, without its checks (nothing here counts backwards); exemplars are not kept."""
        self._value.inc(amount)


class _Histogram(_Family, Histogram):
    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """As the library's, which goes through the buckets one by one; exemplars are not kept."""
        self._sum.inc(amount)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(1)


def _counter(name: str, doc: str, labels: Sequence[str] = ()) -> Counter:
    return _Counter(name, doc, labels, registry=REGISTRY)


def _gauge(name: str, doc: str, labels: Sequence[str] = ()) -> Gauge:
    return Gauge(name, doc, labels, registry=REGISTRY, multiprocess_mode="livesum")


def _histogram(name: str, doc: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
    return _Histogram(name, doc, labels, buckets=buckets, registry=REGISTRY)


# -- what was asked, and what became of it
HTTP_REQUESTS = _counter(
    "helium_http_requests_total",
    "HTTP requests by route (`operator`: those of operators and the page) and status; no probes, no scrapes.",
    ["route", "status"],
)
CALLS = _counter(
    "helium_calls_total",
    "LLM calls by fate: computed, hit, coalesced, error.",
    ["workflow", "node", "model", "fate"],
)
PROMPT_TOKENS = _counter(
    "helium_prompt_tokens_total",
    "Prompt tokens by fate: computed (prefilled), kv_hit (prefix cache), coalesced, prompt_cache.",
    ["workflow", "node", "fate"],
)
OUTPUT_TOKENS = _counter(
    "helium_output_tokens_total",
    "Output tokens by fate: computed, coalesced, prompt_cache.",
    ["workflow", "node", "fate"],
)
SAVED_SECONDS = _counter(
    "helium_saved_engine_seconds_total",
    "Engine seconds saved, at the measured prefill and decode rates, by what saved them.",
    ["workflow", "by"],
)
ERRORS = _counter("helium_errors_total", "Errors answered to clients, by kind.", ["kind"])
FAIL_OPEN = _counter(
    "helium_fail_open_total", "Times a room failed and the call passed through without it.", ["room"]
)
DISCONNECTS = _counter("helium_client_disconnects_total", "Clients that left before their answer was complete.")
STREAMS_OPEN = _gauge("helium_streams_open", "Streams being relayed now.")

# -- time
OVERHEAD = _histogram("helium_overhead_seconds", "The proxy's own work per call before it is queued.", _MICRO)
QUEUE_SECONDS = _histogram("helium_queue_seconds", "Time a call waited for a worker.", _SECONDS, ["model"])
DECIDE_SECONDS = _histogram("helium_decide_seconds", "Duration of one dispatch decision.", _MICRO)
FIRST_TOKEN_SECONDS = _histogram(
    "helium_first_byte_seconds", "From arrival to the first byte of the answer.", _SECONDS, ["model"]
)
CALL_SECONDS = _histogram("helium_call_seconds", "From arrival to the end of the answer.", _SECONDS, ["model"])
UPSTREAM_SECONDS = _histogram("helium_upstream_seconds", "Time a worker took for a call.", _SECONDS, ["worker"])

# -- predictions against what happened
PREDICTED_CACHED = _counter(
    "helium_predicted_cached_tokens_total", "Prompt tokens predicted to be resident.", ["worker"]
)
ACTUAL_CACHED = _counter(
    "helium_actual_cached_tokens_total", "Prompt tokens the worker reported as cached.", ["worker"]
)
CACHED_ERROR = _histogram(
    "helium_cached_prediction_error_tokens",
    "Absolute difference of predicted and actual cached tokens, per call.",
    _TOKENS,
)
OUTPUT_RATIO = _histogram("helium_output_prediction_ratio", "Predicted ÷ actual output tokens, per call.", _RATIO)
FINISH_RATIO = _histogram(
    "helium_finish_prediction_ratio", "Predicted ÷ actual duration on the worker, per call.", _RATIO
)

# -- dispatch
QUEUED = _gauge("helium_queue_calls", "Calls waiting for a worker.", ["model"])
PLACEMENTS = _counter(
    "helium_placements_total",
    "Placement decisions by reason: prefix, balance, state, only, idle, round-robin, least-loaded.",
    ["worker", "reason"],
)
RETRIES = _counter("helium_retries_total", "Calls sent again before their first byte, by reason.", ["reason"])

# -- workers
WORKER_UP = _gauge(
    "helium_worker_up", "1 while the worker is up; its model is empty until it is known.", ["worker", "model"]
)
WORKER_RUNNING = _gauge("helium_worker_running_calls", "Calls of ours on the worker.", ["worker"])
WORKER_BLOCKS = _gauge("helium_worker_capacity_blocks", "KV capacity in blocks.", ["worker"])
WORKER_RESIDENT = _gauge("helium_worker_resident_blocks", "Blocks believed resident.", ["worker"])
WORKER_PINNED = _gauge("helium_worker_pinned_blocks", "Blocks pinned.", ["worker"])
WORKER_PIN_BUDGET = _gauge("helium_worker_pin_budget_blocks", "Blocks that may be pinned.", ["worker"])
WORKER_PREFILL_RATE = _gauge("helium_worker_prefill_tokens_per_second", "Measured prefill rate.", ["worker"])
WORKER_DECODE_RATE = _gauge("helium_worker_decode_tokens_per_second", "Measured decode rate of one call.", ["worker"])
BREAKER_OPENS = _counter("helium_breaker_opens_total", "Times a worker's circuit breaker opened.", ["worker"])

# -- workflows
RUNS_LIVE = _gauge("helium_runs_live", "Runs in progress.")
RUNS = _counter("helium_runs_total", "Runs ended, by how: final, idle, api, evicted.", ["workflow", "end"])
MAKESPAN = _histogram(
    "helium_run_makespan_seconds", "From a run's first arrival to its last answer.", _SECONDS, ["workflow"]
)
CRITICAL_PATH = _histogram(
    "helium_run_critical_path_seconds",
    "Longest chain of dependent calls of a run, by time.",
    _SECONDS,
    ["workflow"],
)
NODE_SECONDS = _counter(
    "helium_node_seconds_total",
    "Seconds of a node's calls, once their run ended: before (since the run began), queue, first_token, decode.",
    ["workflow", "node", "phase"],
)
NODE_CALLS = _counter("helium_node_calls_total", "Calls in helium_node_seconds_total.", ["workflow", "node"])
TAGS = _counter("helium_tags_total", "Tag values accepted, by source.", ["source"])
TAG_CONFLICTS = _counter("helium_tag_conflicts_total", "Sources that disagreed, by field.", ["field"])
TAGS_IGNORED = _counter(
    "helium_tags_ignored_total", "Bad tag values ignored, by field; `unknown`: of no field.", ["field"]
)
EDGES = _counter("helium_edges_total", "Edges added to runs, by source: tag, native, inferred.", ["source"])

# -- reuse
CACHE_REQUESTS = _counter(
    "helium_prompt_cache_requests_total",
    "Prompt cache look-ups: hit, miss, stale, bypass, error.",
    ["result"],
)
CACHE_ENTRIES = _gauge("helium_prompt_cache_entries", "Answers held by the prompt cache.")
CACHE_BYTES = _gauge("helium_prompt_cache_bytes", "Bytes held by the prompt cache.")
CACHE_EVICTIONS = _counter("helium_prompt_cache_evictions_total", "Answers evicted from the prompt cache.")

# -- directives
DIRECTIVES = _counter(
    "helium_directives_total", "Directives sent: pin, renew, unpin, prewarm; by result.", ["kind", "result"]
)
PREWARM_TOKENS = _counter("helium_prewarm_tokens_total", "Prompt tokens sent ahead of need.", ["reason"])
LOOKAHEAD = _counter("helium_lookahead_total", "Prewarmed prefixes: used, wasted, skipped.", ["result"])
PREFIXES_LOST = _counter(
    "helium_prefixes_lost_total", "Static prefixes worth keeping that a worker has evicted.", ["worker"]
)
KV_EVENTS = _counter("helium_kv_events_total", "KV events received.", ["worker", "kind"])
KV_GAPS = _counter("helium_kv_event_gaps_total", "Gaps in the sequence of KV events.", ["worker"])

# Label values known beforehand start at 0: a rate over the first event is then right, and no panel is empty.
for _family, _values in (
    (CACHE_REQUESTS, ("hit", "miss", "stale", "bypass", "error")),
    (LOOKAHEAD, ("used", "wasted", "skipped")),
    (EDGES, ("tag", "native", "inferred")),
    (TAGS, ("body", "header", "baggage", "native")),
    (TAG_CONFLICTS, ("workflow", "run", "node", "parents", "final", "deadline_ms", "priority")),
    (TAGS_IGNORED, ("workflow", "run", "node", "parents", "final", "deadline_ms", "priority", "unknown")),
    (
        ERRORS,
        (
            *("queue_full", "no_worker", "upstream_error", "draining", "deadline_exceeded", "invalid_api_key"),
            "cache_miss",
        ),
    ),
    (
        FAIL_OPEN,
        ("workflow", "dispatch", "tokenizer", "directives", "kv_events", "reuse", "planner", "estimate"),
    ),
    (RETRIES, ("refused", "lost", "timeout")),
):
    for _value in _values:
        _family.labels(_value)
for _kind in ("pin", "renew", "unpin", "prewarm"):
    for _result in ("ok", "error"):
        DIRECTIVES.labels(_kind, _result)


def start_worker(worker: str) -> None:
    """Start the counters of a new worker at 0."""
    for family in (BREAKER_OPENS, KV_GAPS, PREFIXES_LOST, PREDICTED_CACHED, ACTUAL_CACHED):
        family.labels(worker)
    for kind in ("stored", "removed", "cleared"):
        KV_EVENTS.labels(worker, kind)


_CAPS = {"workflow": 100, "node": 400, "model": 50}
_UNSAFE = re.compile(r"[^\w.:/@#-]")
_seen: dict[str, dict[str, str]] = {label: {} for label in _CAPS}


def bounded(label: str, value: str, *, admit: bool = True) -> str:
    """`value` as a safe label: at most `_CAPS[label]` distinct ones are admitted, the rest are ``other``. So is a new
    one that is not to be admitted."""
    seen = _seen[label]
    known = seen.get(value)
    if known is not None:
        return known
    if not admit or len(seen) >= _CAPS[label]:
        return "other"
    safe = _UNSAFE.sub("_", value)[:64] or "none"
    seen[value[:256]] = safe
    return safe


def shared_files() -> str | None:
    """The folder of the files through which several processes count as one; None: this one counts for itself. Files
    cannot drop any series."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR")


def sweep(*, ending: bool = False) -> None:
    """Gauges of processes that have ended are no longer counted; with `ending`, nor are this one's."""
    folder = shared_files()
    if folder is None:
        return
    here = {int(found[1]) for name in os.listdir(folder) if (found := re.search(r"_live\w*_(\d+)\.db$", name))}
    for pid in here:
        if ending if pid == os.getpid() else not _alive(pid):
            multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def forget_worker(worker: str) -> None:
    """Drops every series of a worker that was removed: they come and go under ever new names."""
    if shared_files() is not None:
        return
    for family in list(globals().values()):
        if isinstance(family, Counter | Gauge | Histogram) and "worker" in family._labelnames:
            family.remove_by_labels({"worker": worker})


def render() -> tuple[bytes, str]:
    """The exposition text and its content type."""
    if shared_files() is not None:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST
