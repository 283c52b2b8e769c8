"""Metrics of whole runs, taken when they end, and the workflow room's own counts as counters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from helium_proxy import metrics
from helium_proxy.workflow import RunEnd, Workflows

RunJson = Mapping[str, Any]


def critical_path_s(run: RunJson) -> float:
    """Seconds of the longest chain of dependent calls, each from its arrival to its end; think time left out."""
    spent = {
        node["call"]: node["finished_at"] - node["queued_at"]
        for node in run["nodes"]
        if node["finished_at"] is not None and node["queued_at"] is not None
    }
    parents: dict[str, list[str]] = {call: [] for call in spent}
    for edge in run["edges"]:
        if edge["from"] in spent and edge["to"] in spent:
            parents[edge["to"]].append(edge["from"])
    longest: dict[str, float] = {}
    try:
        for call in TopologicalSorter(parents).static_order():
            longest[call] = spent[call] + max((longest[parent] for parent in parents[call]), default=0.0)
    except CycleError:
        return 0.0
    return max(longest.values(), default=0.0)


def phases(node: Mapping[str, Any], began: float) -> dict[str, float]:
    """Seconds of one finished call by phase: before it (since its run began), queue, first_token, decode."""
    queued, ended = node["queued_at"], node["finished_at"]
    if queued is None or ended is None:
        return {}
    first = node["first_token_at"] if node["first_token_at"] is not None else ended
    started = node["started_at"] if node["started_at"] is not None else first  # no worker had it
    spent = {
        "before": queued - began,
        "queue": started - queued,
        "first_token": first - started,
        "decode": ended - first,
    }
    return {phase: max(0.0, seconds) for phase, seconds in spent.items()}


class RunMetrics:
    """Called once a second with the runs that ended since."""

    def __init__(self, workflows: Workflows) -> None:
        self._workflows = workflows
        # -- state: what has been counted of the workflow room's own running totals
        self._counted: dict[str, int] = {}

    def tick(self, ends: Iterable[RunEnd]) -> None:
        """Count `ends`, and what the workflow room has counted since the last tick."""
        for end in ends:
            self._ended(end)
        totals = self._workflows.statistics()
        for source, total in (
            ("tag", totals.edges_tag),
            ("native", totals.edges_native),
            ("inferred", totals.edges_inferred),
        ):
            metrics.EDGES.labels(source).inc(self._new(source, total))
        for metric, counted in (
            (metrics.TAGS, totals.tags_by_source),
            (metrics.TAG_CONFLICTS, totals.conflicts_by_field),
            (metrics.TAGS_IGNORED, totals.ignored_by_field),
        ):
            for label, total in counted.items():
                metric.labels(label).inc(self._new(f"{metric}/{label}", total))
        metrics.FAIL_OPEN.labels("workflow").inc(self._new("failures", totals.failures))

    def _new(self, name: str, total: int) -> int:
        grown = max(0, total - self._counted.get(name, 0))
        self._counted[name] = total
        return grown

    def _ended(self, end: RunEnd) -> None:
        workflow = metrics.bounded("workflow", end.workflow)
        metrics.RUNS.labels(workflow, end.reason).inc()
        metrics.MAKESPAN.labels(workflow).observe(end.seconds)
        run = self._workflows.run(end.run, end.tenant)
        if run is None:
            return
        metrics.CRITICAL_PATH.labels(workflow).observe(critical_path_s(run))
        began = min((node["queued_at"] for node in run["nodes"] if node["queued_at"] is not None), default=0.0)
        for node in run["nodes"]:
            spent = phases(node, began)
            if not spent:
                continue
            name = metrics.bounded("node", node["node"].split("#", 1)[0])
            metrics.NODE_CALLS.labels(workflow, name).inc()
            for phase, seconds in spent.items():
                metrics.NODE_SECONDS.labels(workflow, name, phase).inc(seconds)
