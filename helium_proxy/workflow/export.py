"""A run and a template as JSON, Mermaid and DOT."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from helium_proxy.workflow.graph import Call, Run
from helium_proxy.workflow.template import ROOT, NodeStats, Template

Clock = Callable[[float], float]
"""From the monotonic clock to Unix seconds."""


def call_json(call: Call, clock: Clock) -> dict[str, Any]:
    """One node of a run's JSON. Times are Unix seconds."""

    def at(when: float | None) -> float | None:
        return None if when is None else clock(when)

    return {
        "call": call.id,
        "node": call.node,
        "state": call.state,
        "fate": call.fate,
        "worker": call.worker,
        "prompt_tokens": call.prompt_tokens,
        "cached_tokens": call.cached_tokens,
        "predicted_cached_tokens": call.predicted_cached_tokens,
        "output_tokens": call.output_tokens,
        "queued_at": at(call.queued_at),
        "started_at": at(call.started_at),
        "first_token_at": at(call.first_token_at),
        "finished_at": at(call.finished_at),
        "iteration": call.iteration,
        "retries": call.retries,
        "status": call.status,
    }


def run_json(run: Run, clock: Clock) -> dict[str, Any]:
    """A run with its calls and edges; edges join calls by id."""
    return {
        "run": run.id,
        "tenant": run.tenant,
        "workflow": run.workflow,
        "state": run.state,
        "ended_by": run.ended_by,
        "started_at": clock(run.created_at),
        "last_at": clock(run.last_at),
        "template": run.template,
        "dropped_calls": run.dropped,
        "waiting_for": sorted(run.waiting),
        "nodes": [call_json(call, clock) for call in run.calls.values()],
        "edges": [
            {"from": parent.id, "to": child.id, "kind": edge.kind, "source": edge.source}
            for parent, child, edge in run.edges()
        ],
    }


def run_summary(run: Run, clock: Clock) -> dict[str, Any]:
    """A run in the list of runs: its counts without its calls."""
    fates: dict[str, int] = {"computed": 0, "hit": 0, "coalesced": 0, "error": 0}
    prompt = cached = output = edges = 0
    for call in run.calls.values():
        if call.fate is not None:
            fates[call.fate] += 1
        prompt += call.prompt_tokens or 0
        cached += call.cached_tokens or 0
        output += call.output_tokens or 0
        edges += len(call.edges)
    return {
        "run": run.id,
        "tenant": run.tenant,
        "workflow": run.workflow,
        "state": run.state,
        "ended_by": run.ended_by,
        "started_at": clock(run.created_at),
        "last_at": clock(run.last_at),
        "calls": len(run.calls),
        "in_flight": run.in_flight,
        "edges": edges,
        "fates": fates,
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "output_tokens": output,
    }


def template_json(template: Template) -> dict[str, Any]:
    """A template's statistics; static text itself is left out."""
    nodes = [stats for key, stats in template.nodes.items() if key != ROOT and stats.calls > 0]
    nodes.sort(key=lambda stats: (stats.rank.mean, stats.key))
    return {
        "template": template.key,
        "workflow": template.workflow,
        "runs": template.runs,
        "nodes": [_node_json(stats) for stats in nodes],
        "edges": [
            {
                "from": _label(source.key) if source.key != ROOT else None,
                "to": _label(child),
                "probability": round(edge.probability(source.closed), 4),
                "fan_out": round(edge.fan_out, 3),
                "fan_in": round(edge.fan_in, 3),
                "think_s": round(edge.think.mean, 4),
                "extends": round(edge.extends.mean, 3),
            }
            for source in (template.nodes[ROOT], *nodes)
            for child, edge in source.edges.items()
            if edge.closed + edge.live > 0
        ],
    }


def _label(key: tuple[str, int]) -> str:
    return key[0] if key[1] == 1 else f"{key[0]}#{key[1]}"


def _node_json(stats: NodeStats) -> dict[str, Any]:
    outputs = sorted(stats.outputs)
    spread = statistics.quantiles(outputs, n=10, method="inclusive") if len(outputs) > 1 else outputs * 9
    known = stats.static_messages
    return {
        "node": stats.key[0],
        "iteration": stats.key[1],
        "calls": stats.calls,
        "per_run": round(stats.per_run.mean, 3),
        "prompt_tokens": round(stats.prompt.mean, 1) if stats.prompt.n else None,
        "output_tokens": {
            "mean": round(stats.output.mean, 1),
            "p50": spread[4],
            "p90": spread[8],
            "samples": stats.output.n,
        }
        if spread
        else None,
        "static_messages": known,
        "static_tokens": round(stats.prompt.mean * stats.static_share) if known else 0,
    }


def _quote(text: str) -> str:
    """`text` inside double quotes, for both drawing languages: no quotes, no line breaks, no markup."""
    safe = "".join(" " if char < " " else char for char in text)
    return '"' + safe.replace("\\", "/").replace('"', "'").replace("<", "‹").replace(">", "›") + '"'


def mermaid(run: Run) -> str:
    """The run as a Mermaid flowchart: dotted edges are spawns, inferred ones are labelled."""
    names = {id(call): f"n{at}" for at, call in enumerate(run.calls.values())}
    lines = ["flowchart TD"]
    lines += [f"  {names[id(call)]}[{_quote(call.node)}]" for call in run.calls.values()]
    for parent, child, edge in run.edges():
        arrow = "-.->" if edge.kind == "spawn" else "-->"
        label = "|inferred|" if edge.source == "inferred" else ""
        lines.append(f"  {names[id(parent)]} {arrow}{label} {names[id(child)]}")
    return "\n".join(lines) + "\n"


def dot(run: Run) -> str:
    """The run as Graphviz DOT: dotted edges are spawns, dashed ones inferred."""
    names = {id(call): f"n{at}" for at, call in enumerate(run.calls.values())}
    lines = [f"digraph {_quote(run.id)} {{"]
    lines += [f"  {names[id(call)]} [label={_quote(call.node)}];" for call in run.calls.values()]
    for parent, child, edge in run.edges():
        style = "dotted" if edge.kind == "spawn" else "dashed" if edge.source == "inferred" else "solid"
        lines.append(f"  {names[id(parent)]} -> {names[id(child)]} [style={style}];")
    return "\n".join([*lines, "}"]) + "\n"
