"""A stand-in for the proxy's JSON routes: one Trading run of 88 calls on two workers, as it stands at any moment.

The page is tested against this without waiting for engines: a test sets the clock, the answer follows from it. Run it
to work on the page: ``python tests/ui/fixture.py [PORT]`` plays the run in a loop.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from helium_proxy.ui import ui_routes

SLOTS = 8  # calls a worker of the fixture runs at once
RUN = "trading-7f3a"


@dataclass
class Step:
    """One call of the recorded run; times in seconds from the run's start."""

    node: str
    parents: tuple[str, ...]
    prompt: int
    output: int
    fate: str = "computed"
    cached: int = 0
    worker: str = ""
    queued: float = 0.0
    started: float = 0.0
    first: float = 0.0
    finished: float = 0.0
    waiting_for: int = field(default=0, repr=False)


def trading() -> list[Step]:
    """Four analysts, a debate with a manager, eight trader branches with a risk debate each, a fund manager."""
    analysts = ("market", "news", "social", "fundamentals")
    steps = [Step(f"analyst_{name}", (), 1180 + 60 * i, 96) for i, name in enumerate(analysts)]
    reports = tuple(step.node for step in steps)
    steps += [Step("bull", reports, 1900, 120), Step("bear", (*reports, "bull"), 2040, 120)]
    steps.append(Step("research_manager", ("bull", "bear"), 2300, 140))
    for branch in range(8):
        trader = f"trader_{branch}"
        steps.append(Step(trader, ("research_manager",), 1320, 64, cached=1024 if branch not in {0, 4} else 0))
        before: tuple[str, ...] = (trader,)
        for turn in range(3):
            here = []
            for role in ("risky", "safe", "neutral"):
                node = f"{role}_{branch}" + (f"#{turn + 1}" if turn else "")
                steps.append(Step(node, before, 900 + 220 * turn, 48, cached=768 + 208 * turn))
                here.append(node)
            before = tuple(here)
    last = tuple(f"{role}_{b}#3" for b in range(8) for role in ("risky", "safe", "neutral"))
    steps.append(Step("fund_manager", last, 3100, 160, cached=256))
    by = {step.node: step for step in steps}
    for node in ("neutral_3", "neutral_6", "safe_5#2"):
        by[node].fate, by[node].cached = "coalesced", 0
    for node in ("analyst_social", "safe_2", "risky_7#3"):
        by[node].fate, by[node].cached = "hit", 0
    by["risky_4#2"].fate = "error"
    return steps


@functools.cache
def recorded() -> tuple[Step, ...]:
    """The run, placed on two workers of `SLOTS` slots in order of readiness, four branches on each."""
    steps = trading()
    by = {step.node: step for step in steps}
    children: dict[str, list[Step]] = {}
    for step in steps:
        step.waiting_for = len(step.parents)
        for parent in step.parents:
            children.setdefault(parent, []).append(step)
    free = {"worker-0": [0.0] * SLOTS, "worker-1": [0.0] * SLOTS}
    ready = [(0.0, i, step) for i, step in enumerate(steps) if not step.parents]
    order = len(steps)
    while ready:
        at, _, step = heapq.heappop(ready)
        step.queued = at
        branch = step.node.split("#")[0].rpartition("_")[2]
        worker = f"worker-{int(branch) // 4}" if branch.isdigit() else f"worker-{len(step.node) % 2}"
        if step.fate in ("hit", "coalesced"):
            step.started = step.first = at
            step.finished = at + (0.004 if step.fate == "hit" else 0.45)
        else:
            step.worker = worker
            step.started = max(at, heapq.heappop(free[worker])) + 0.004
            step.first = step.started + 0.02 + (step.prompt - step.cached) / 6000
            step.finished = step.first + step.output * 0.011
            heapq.heappush(free[worker], step.finished)
        for child in children.get(step.node, []):
            child.waiting_for -= 1
            if not child.waiting_for:
                order += 1
                begin = max(by[parent].finished for parent in child.parents) + 0.05
                heapq.heappush(ready, (begin, order, child))
    return tuple(steps)


def duration() -> float:
    return max(step.finished for step in recorded())


def run_at(now: float, run: str = RUN, begin: float = 1000.0) -> dict[str, Any]:
    """The run JSON `now` seconds after its start; the clock's zero is arbitrary, as the proxy's is."""
    nodes, known = [], set()
    for step in recorded():
        if step.queued > now:
            continue
        known.add(step.node)
        done, started = step.finished <= now, step.started <= now
        node: dict[str, Any] = {
            "call": f"{run}-{step.node}",
            "node": step.node,
            "state": ("error" if step.fate == "error" else "done") if done else "running" if started else "queued",
            "fate": step.fate if done else None,
            "worker": step.worker or None if started else None,
            "prompt_tokens": step.prompt if done else None,
            "cached_tokens": step.cached if done and step.fate == "computed" else None,
            "predicted_cached_tokens": step.cached - step.cached % 16 if done and step.worker else None,
            "output_tokens": step.output if done else None,
            "queued_at": begin + step.queued,
            "started_at": begin + step.started if started else None,
            "first_token_at": begin + step.first if step.first <= now else None,
            "finished_at": begin + step.finished if done else None,
        }
        nodes.append(node)
    edges = [
        {"from": f"{run}-{parent}", "to": f"{run}-{step.node}", "kind": "data", "source": "tag"}
        for step in recorded()
        if step.node in known
        for parent in step.parents
    ]
    state = "done" if now >= duration() else "live"
    expected = [
        {
            "node": base(step.node),
            "iteration": 1,
            "calls": 1,
            "prompt_tokens": step.prompt,
            "output_tokens": step.output,
        }
        for step in recorded()
        if step.node not in known
    ]
    return {
        "run": run,
        "workflow": "trading",
        "state": state,
        "nodes": nodes,
        "edges": edges,
        "expected": expected,
    }


def base(node: str) -> str:
    """The node's name without its branch and turn."""
    name = node.split("#", maxsplit=1)[0]
    head, _, tail = name.rpartition("_")
    return head if tail.isdigit() else name


def counts(run: dict[str, Any]) -> dict[str, Any]:
    fates = [node["fate"] for node in run["nodes"]]
    tallies = {fate: fates.count(fate) for fate in ("computed", "hit", "coalesced", "error")}
    prompt = sum(node["prompt_tokens"] or 0 for node in run["nodes"])
    return {"calls": len(fates), "fates": tallies, "prompt_tokens": prompt}


def _workers(now: float) -> dict[str, Any]:
    nodes = run_at(now)["nodes"]
    workers = []
    for index in range(2):
        name = f"worker-{index}"
        mine = [node for node in nodes if node["worker"] == name]
        resident = min(2048, 40 * len(mine))
        workers.append(
            {
                "id": name,
                "url": f"http://10.0.0.{index + 4}:8000",
                "models": ["demo"],
                "state": "up",
                "running": sum(node["state"] == "running" for node in mine),
                "waiting": 0,
                "block_size": 16,
                "capacity_blocks": 2048,
                "resident_blocks": resident,
                "pinned_blocks": min(384, resident // 3),
                "pin_budget_blocks": 614,
                "prefill_tokens_per_s": 6021.4,
                "decode_tokens_per_s": 91.2,
                "preemptions": 0,
                "engine": "vllm",
                "plugin": True,
                "tokenizer": "exact",
                "error": None,
                "pins": {"trading/trader": 64, "trading/risky": 48, "trading/safe": 48},
            }
        )
    return {"workers": workers}


def _templates() -> dict[str, Any]:
    bases: dict[str, Step] = {}
    count: dict[str, int] = {}
    edges: dict[tuple[str, str], None] = {}
    for step in recorded():
        name = base(step.node)
        bases.setdefault(name, step)
        count[name] = count.get(name, 0) + 1
        for parent in {base(parent) for parent in step.parents} - {name}:
            edges[parent, name] = None
    order = list(bases)
    nodes = [
        {
            "node": name,
            "iteration": 1,
            "calls": 5 * count[name],
            "per_run": count[name],
            "prompt_tokens": step.prompt,
            "output_tokens": {
                "mean": step.output,
                "p50": step.output,
                "p90": step.output,
                "samples": 5 * count[name],
            },
            "static_messages": 1,
            "static_tokens": 768,
        }
        for name, step in bases.items()
    ]
    links = [
        {"from": one, "to": two, "probability": 1.0, "think_s": 0.05}
        for one, two in edges
        if order.index(one) < order.index(two)
    ]
    return {"templates": [{"template": "trading", "workflow": "trading", "runs": 5, "nodes": nodes, "edges": links}]}


PLAN: dict[str, Any] = {
    "object": "workflow.plan",
    "workflow": "map-reduce",
    "operators_submitted": 8,
    "operators_planned": 5,
    "inputs": 2,
    "warnings": ["no worker that is up serves model 'demo', which 5 operators will ask for"],
    "rewrites": [
        {"rule": "prune", "dropped": 2, "fetched": 0, "nodes": {"unused": 2}},
        {"rule": "cache_fetch", "dropped": 0, "fetched": 1, "nodes": {"expert_law": 1}},
    ],
    "prefix_tree": [
        {
            "model": "demo",
            "tokens": 0,
            "operators_below": 5,
            "children": [
                {
                    "segment": "<system> You are an expert in cost.",
                    "tokens": 14,
                    "operators_below": 2,
                    "children": [
                        {"operator": "expert_cost[0]", "tokens": 9, "operators_below": 1},
                        {"operator": "expert_cost[1]", "tokens": 8, "operators_below": 1},
                    ],
                }
            ],
        }
    ],
    "workers": [{"name": "worker-0", "kv_tokens": 32768, "operators": 3}, {"name": "worker-1", "kv_tokens": 32768}],
    "predicted": {"makespan_s": 1.52, "prompt_tokens": 412, "computed_tokens": 331, "fewest_computed_tokens": 331},
    "actual": None,
    "operators": [
        {"operator": "expert_law[0]", "depends_on": [], "cache_fetch": True},
        {"operator": "expert_law[1]", "depends_on": [], "worker": "worker-0", "prompt_tokens": 23,
         "predicted_computed_tokens": 23, "predicted_started_s": 0.0, "predicted_finished_s": 0.71},
        {"operator": "expert_cost[0]", "depends_on": [], "worker": "worker-1", "prompt_tokens": 23,
         "predicted_computed_tokens": 23, "predicted_started_s": 0.0, "predicted_finished_s": 0.7},
        {"operator": "expert_cost[1]", "depends_on": [], "worker": "worker-1", "prompt_tokens": 22,
         "predicted_computed_tokens": 8, "predicted_started_s": 0.0, "predicted_finished_s": 0.72},
        {"operator": "summary[0]", "depends_on": ["expert_law[0]", "expert_cost[0]"], "worker": "worker-1",
         "prompt_tokens": 170, "predicted_computed_tokens": 150, "predicted_started_s": 0.7,
         "predicted_finished_s": 1.5},
        {"operator": "summary[1]", "depends_on": ["expert_law[1]", "expert_cost[1]"], "worker": "worker-0",
         "prompt_tokens": 174, "predicted_computed_tokens": 150, "predicted_started_s": 0.72,
         "predicted_finished_s": 1.52},
    ],
}  # fmt: skip
_JOB = {
    "id": "wf-1",
    "workflow": "map-reduce",
    "status": "completed",
    "operators": {"submitted": 8, "planned": 5},
    "inputs": {"total": 1},
}


@dataclass
class Fixture:
    """`clock()`: seconds since the run's start. With a `key`, the JSON routes ask for it."""

    clock: Callable[[], float]
    key: str | None = None
    mode: str = "full"
    others: tuple[str, ...] = ("trading-51c0", "trading-2b9e")
    """Runs that have ended, beside `RUN`."""
    asked: list[tuple[str, int]] = field(default_factory=list)
    """(path, status) of every JSON request so far."""

    def app(self) -> Starlette:
        def answer(make: Callable[[Request], dict[str, Any]]) -> Callable[[Request], Any]:
            async def route(request: Request) -> Response:
                response = self._answer(request, make)
                self.asked.append((request.url.path, response.status_code))
                return response

            return route

        return Starlette(
            routes=[
                *ui_routes(),
                Route("/helium/runs", answer(self._runs)),
                Route("/helium/runs/{run}", answer(lambda request: run_at(*self._of(request.path_params["run"])))),
                Route("/helium/workers", answer(lambda _: _workers(self.clock()))),
                Route("/helium/templates", answer(lambda _: _templates())),
                Route("/v1/workflows", answer(lambda _: {"object": "list", "data": [_JOB]})),
                Route("/v1/workflows/explain", answer(lambda _: PLAN), methods=["POST"]),
                Route("/v1/workflows/{id}/explain", answer(lambda _: PLAN)),
            ]
        )

    def _of(self, run: str) -> tuple[float, str]:
        return (self.clock() if run == RUN else duration(), run)

    def _runs(self, request: Request) -> dict[str, Any]:
        runs = [run_at(*self._of(name)) for name in (RUN, *self.others)]
        wanted = request.query_params
        kept = [
            run
            for run in runs
            if wanted.get("state") in (None, run["state"]) and wanted.get("workflow") in (None, run["workflow"])
        ]
        if self.mode == "passthrough":
            kept = []
        listed = [{k: run[k] for k in ("run", "workflow", "state")} | counts(run) for run in kept]
        return {"runs": listed, "mode": self.mode}

    def _answer(self, request: Request, make: Callable[[Request], dict[str, Any]]) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "invalid API key"}}, 401)
        return Response(json.dumps(make(request)), media_type="application/json")


if __name__ == "__main__":
    started = time.monotonic()
    fixture = Fixture(lambda: (time.monotonic() - started) % (duration() + 4))
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8765
    asyncio.run(uvicorn.Server(uvicorn.Config(fixture.app(), port=port, log_level="warning")).serve())
