"""How long planning takes: the paper's Trading workflow over a growing batch, from parsed JSON to the schedule.

    python -m benchmarks.planning [--repeats N] [--out FILE]

CPU seconds of one process (the machine may be busy with other things), the least and the median of the repeats; the
paper's figure for 16 inputs (1,408 calls) is 230 ms of wall time.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any

from helium_proxy.planner.cost import PlanWorker
from helium_proxy.planner.pipeline import Planning, make_physical
from helium_proxy.planner.plan import parse_plan

ANALYSTS = ("fundamentals", "market", "news", "social")


def trading(inputs: int, words: int = 300) -> dict[str, Any]:
    """The Trading workflow: 88 calls a run; system prompts and reports of about `words` words."""

    def node(name: str, role: str, user: str) -> dict[str, Any]:
        system = f"You are the {role}. " + f"{role} rule, " * words
        return {"id": name, "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}

    reports = "\n".join(f"{{{{nodes.{name}}}}}" for name in ANALYSTS)
    nodes = [node(name, name, f"{{{{inputs.{name}}}}}") for name in ANALYSTS]
    said = reports
    for turn in range(2):
        side = ("bull", "bear")[turn]
        nodes.append(node(side, side, said))
        said += f"{{{{nodes.{side}}}}}"
    nodes.append(node("manager", "manager", said))
    ends = []
    for branch in range(8):
        nodes.append(node(f"trader_{branch}", "trader", f"{reports}{{{{nodes.manager}}}} style {branch}"))
        said = f"{reports}{{{{nodes.trader_{branch}}}}}"
        for turn in range(9):
            role = ("risky", "safe", "neutral")[turn % 3]
            nodes.append(node(f"{role}_{branch}_{turn}", role, said))
            said += f"{{{{nodes.{role}_{branch}_{turn}}}}}"
        ends.append(nodes[-1]["id"])
    nodes.append(node("fund", "fund manager", reports + "".join(f"{{{{nodes.{end}}}}}" for end in ends)))
    assert len(nodes) == 88
    rows = [
        {name: f"{name} of company {row}: " + f"{row} item, " * words for name in ANALYSTS} for row in range(inputs)
    ]
    params = {"temperature": 0, "max_tokens": 128}
    return {"workflow": "trading", "model": "m", "params": params, "nodes": nodes, "inputs": rows}


def measure(inputs: int, workers: int, repeats: int) -> dict[str, Any]:
    """Planning times, and what the schedule is worth by the paper's objective and by the forecast."""
    raw = trading(inputs)
    planning = Planning(workers=[PlanWorker(f"w{k}") for k in range(workers)])
    cpu, wall = [], []
    for _ in range(repeats):
        began, at = time.process_time(), time.perf_counter()
        plan = make_physical(parse_plan(raw), planning)
        cpu.append(time.process_time() - began)
        wall.append(time.perf_counter() - at)
    tracemalloc.start()
    kept = make_physical(parse_plan(raw), planning)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept.solution == plan.solution
    prompt = sum(plan.tree.prompts.values())
    return {
        "inputs": inputs,
        "calls": len(plan.ids),
        "workers": workers,
        "cpu_ms_least": round(min(cpu) * 1e3, 1),
        "cpu_ms_median": round(median(cpu) * 1e3, 1),
        "wall_ms_least": round(min(wall) * 1e3, 1),
        "kept_mib": round(held / 2**20, 2),
        "peak_mib": round(peak / 2**20, 2),
        "makespan_over_bound": round(plan.solution.makespan / plan.problem.lower_bound, 4),
        "hit_rate": round(1 - plan.forecast.computed_tokens / prompt, 4),
        "best_possible_hit_rate": round(1 - plan.tree.distinct_tokens / prompt, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planning.json")
    args = parser.parse_args()
    found = []
    for inputs, workers in ((1, 2), (4, 2), (16, 1), (16, 2), (16, 8), (64, 8)):
        one = measure(inputs, workers, args.repeats)
        found.append(one)
        print(
            f"{one['calls']:>5} calls on {workers} workers: {one['cpu_ms_least']:>7.1f} ms CPU (median "
            f"{one['cpu_ms_median']:.1f}), makespan {one['makespan_over_bound']:.3f} x the lower bound, "
            f"hit rate {one['hit_rate']:.1%} of at most {one['best_possible_hit_rate']:.1%}",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
