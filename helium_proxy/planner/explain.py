"""What the planner decided, as text and as JSON, like a database's EXPLAIN; with what happened, EXPLAIN ANALYZE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from helium_proxy.planner.graph import Mark
from helium_proxy.planner.pipeline import ANY, PhysicalPlan
from helium_proxy.planner.trie import TrieNode
from helium_proxy.planner.words import counted

_DEEPEST = 100
"""Levels of the prefix tree that are shown: JSON encoders and readers have a limit of their own."""
_LONGEST_ERROR = 300
"""Characters of an operator's error in the text; a worker may answer with pages."""


@dataclass(frozen=True, slots=True)
class Actual:
    """What happened to one operator. Times in seconds since the job began."""

    status: str
    fate: str | None = None
    worker: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    started_s: float | None = None
    finished_s: float | None = None
    error: str | None = None
    """Why it failed, or why what it depends on did."""

    @property
    def computed_tokens(self) -> int | None:
        """Prompt tokens that an engine computed for this operator; None where it did not say."""
        if self.fate in ("hit", "coalesced"):
            return 0
        return None if self.prompt_tokens is None else self.prompt_tokens - (self.cached_tokens or 0)


def explain_json(plan: PhysicalPlan, actuals: Mapping[int, Actual] | None = None) -> dict[str, Any]:
    """Everything of `plan`: sizes in tokens, `begin` and `complete` in token steps, times in seconds."""
    solution, graph, number = plan.solution, plan.graph, plan.number
    operators: list[dict[str, Any]] = []
    for id_, operator in graph.operators.items():
        entry: dict[str, Any] = {
            "operator": operator.name,
            "node": operator.template.node,
            "input": operator.row,
            "model": operator.template.model,
            "depends_on": [graph.operators[dep].name for dep in operator.deps],
        }
        if operator.fetched is not None:
            entry["cache_fetch"] = True
        else:
            j = number[id_]
            entry |= {
                "order": plan.rank[id_],
                "worker": plan.workers[plan.placement[id_]].name,
                "prompt_tokens": round(plan.tree.prompts[id_]),
                "predicted_computed_tokens": round(plan.forecast.computed[id_]),
                "predicted_output_tokens": round(plan.tree.lengths[id_]),
                "prefill_tokens": round(solution.prefill[j]),
                "begin": round(solution.begin[j], 3),
                "complete": round(solution.complete[j], 3),
                "critical_path": round(plan.problem.tail[j], 3),
                "predicted_started_s": round(plan.forecast.started[id_], 4),
                "predicted_finished_s": round(plan.forecast.finished[id_], 4),
            }
        if actuals is not None and id_ in actuals:
            actual = actuals[id_]
            entry["actual"] = {**asdict(actual), "computed_tokens": actual.computed_tokens}
        operators.append(entry)
    return {
        "object": "workflow.plan",
        "workflow": graph.workflow,
        "operators_submitted": plan.submitted,
        "operators_planned": len(plan.ids),
        "inputs": len(graph.outputs),
        "warnings": _warnings(plan),
        "rewrites": [
            {"rule": r.rule, "dropped": r.dropped, "fetched": r.fetched, "nodes": dict(r.nodes)}
            for r in plan.rewrites
        ],
        "prefix_tree": _tree_json(plan),
        "workers": [
            {"name": w.name, "kv_tokens": w.kv_tokens, "operators": sum(k == i for k in plan.placement.values())}
            for i, w in enumerate(plan.workers)
        ],
        "predicted": {
            "makespan_steps": round(solution.makespan, 3),
            "lower_bound_steps": round(plan.problem.lower_bound, 3),
            "makespan_s": round(plan.forecast.makespan_s, 4),
            "prompt_tokens": round(sum(plan.tree.prompts.values())),
            "computed_tokens": round(plan.forecast.computed_tokens),
            "fewest_computed_tokens": round(plan.tree.distinct_tokens),
        },
        "actual": _totals(actuals) if actuals is not None else None,
        "planning_s": round(plan.planning_s, 5),
        "operators": operators,
    }


def _warnings(plan: PhysicalPlan) -> list[str]:
    nobody = ["no worker is up: planned for one of usual speed"] if plan.workers[0].name == ANY else []
    return nobody + [
        f"no worker that is up serves model {model!r}, which {counted(count, 'operator')} will ask for"
        for model, count in plan.unserved.items()
    ]


def _totals(actuals: Mapping[int, Actual]) -> dict[str, Any]:
    computed = [a.computed_tokens for a in actuals.values() if a.computed_tokens is not None]
    return {
        "makespan_s": round(
            max((a.finished_s for a in actuals.values() if a.finished_s is not None), default=0.0), 4
        ),
        "prompt_tokens": sum(a.prompt_tokens or 0 for a in actuals.values()),
        "computed_tokens": sum(computed),
        "output_tokens": sum(a.output_tokens or 0 for a in actuals.values()),
        "status": dict(Counter(a.status for a in actuals.values())),
        "fate": dict(Counter(a.fate for a in actuals.values() if a.fate is not None)),
    }


def _segment_text(plan: PhysicalPlan, node: TrieNode, width: int = 60) -> str:
    """A segment as one line: marks as <role>, placeholders by their operator's name, text shortened."""
    shown = []
    for element in node.segment:
        if isinstance(element, Mark):
            shown.append(f"<{element.label}>" if not element.label.startswith("part ") else "<part>")
        elif isinstance(element, int):
            shown.append(f"{{{plan.graph.operators[element].name}}}")
        else:
            shown.append(element)
    line = " ".join("".join(shown).split())
    return line if len(line) <= width else line[: width * 2 // 3] + " … " + line[-width // 3 :]


def _below(plan: PhysicalPlan) -> dict[TrieNode, int]:
    """Node → operators whose prompts run through it."""
    return Counter(node for path in plan.tree.paths.values() for node in path)


def _tree_json(plan: PhysicalPlan) -> list[dict[str, Any]]:
    below = _below(plan)
    made: list[dict[str, Any]] = []
    stack: list[dict[str, Any]] = []
    names = {id(root): model for model, root in plan.tree.roots.items()}
    for level, node in plan.tree.walk():
        if level > _DEEPEST:
            stack[_DEEPEST]["deeper"] = stack[_DEEPEST].get("deeper", 0) + 1
            continue
        entry: dict[str, Any] = {"tokens": round(node.tokens), "operators_below": below[node]}
        if node.operator is not None:
            entry["operator"] = plan.graph.operators[node.operator].name
        elif level == 0:
            entry["model"] = names[id(node)]
        else:
            entry["segment"] = _segment_text(plan, node)
        del stack[level:]
        if stack:
            stack[-1].setdefault("children", []).append(entry)
        else:
            made.append(entry)
        stack.append(entry)
    return made


def explain_text(plan: PhysicalPlan, actuals: Mapping[int, Actual] | None = None, *, max_lines: int = 60) -> str:
    """`plan` for people: at most about `max_lines` of the tree and of each worker's order."""
    predicted = _prediction(plan)
    lines = [
        f"Workflow {plan.graph.workflow}: {counted(plan.submitted, 'operator')} over "
        f"{counted(len(plan.graph.outputs), 'input')}, {len(plan.ids):,} to compute "
        f"(planned in {plan.planning_s * 1e3:.0f} ms)",
        *(f"Warning: {warning}" for warning in _warnings(plan)),
        "Rewrites",
    ]
    for done in plan.rewrites:
        most = sorted(done.nodes.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{node} x{count}" for node, count in most[:6]) + (", …" if len(most) > 6 else "")
        what = f"{done.fetched} fetched, {done.dropped} dropped" if done.fetched else f"{done.dropped} dropped"
        lines.append(f"  {done.rule:<12} {what}" + (f"  ({shown})" if shown else ""))
    lines.append("Prefix tree (tokens, operators below)")
    lines += _tree_lines(plan, max_lines)
    lines.append(predicted)
    if actuals is not None:
        total = _totals(actuals)
        lines.append(
            f"Actual: {total['makespan_s']:.2f} s, {total['computed_tokens']:,} of {total['prompt_tokens']:,} prompt "
            f"tokens computed, {counted(total['output_tokens'], 'output token')}; "
            + ", ".join(f"{count} {name}" for name, count in total["status"].items())
        )
        lines += _failed_lines(plan, actuals, max_lines)
    for k, worker in enumerate(plan.workers):
        lines += _worker_lines(plan, k, worker.name, actuals, max_lines)
    return "\n".join(lines) + "\n"


def _prediction(plan: PhysicalPlan) -> str:
    """The prediction in one line."""
    prompt = sum(plan.tree.prompts.values())
    return (
        f"Predicted: {counted(round(plan.solution.makespan), 'token step')} "
        f"(at least {plan.problem.lower_bound:,.0f}), "
        f"{plan.forecast.makespan_s:.2f} s, {plan.forecast.computed_tokens:,.0f} of {prompt:,.0f} prompt tokens "
        f"computed (fewest possible {plan.tree.distinct_tokens:,.0f})"
    )


def _tree_lines(plan: PhysicalPlan, max_lines: int) -> list[str]:
    below = _below(plan)
    lines: list[str] = []
    hidden = 0
    names = {id(root): model for model, root in plan.tree.roots.items()}
    for level, node in plan.tree.walk():
        if node.operator is not None and not node.children and level:
            text = f"-> {plan.graph.operators[node.operator].name}"
        else:
            text = f"model {names[id(node)]}" if level == 0 else _segment_text(plan, node)
        if len(lines) < max_lines:
            lines.append(f"  {'  ' * min(level, 20)}{round(node.tokens):>5} x{below[node]:<4} {text}")
        else:
            hidden += 1
    if hidden:
        lines.append(f"  … {counted(hidden, 'more node')}")
    return lines


def _failed_lines(plan: PhysicalPlan, actuals: Mapping[int, Actual], max_lines: int) -> list[str]:
    """The operators that failed, each with its error; what they took with them is only counted, in the totals."""
    failed = [id_ for id_, actual in actuals.items() if actual.status == "failed"]
    lines = ["Failed"] if failed else []
    for id_ in failed[:max_lines]:
        error = " ".join((actuals[id_].error or "no reason given").split())
        shown = error if len(error) <= _LONGEST_ERROR else error[:_LONGEST_ERROR] + "…"
        lines.append(f"  {plan.graph.operators[id_].name}: {shown}")
    if len(failed) > max_lines:
        lines.append(f"  … {len(failed) - max_lines:,} more")
    return lines


def _happened(actual: Actual) -> str:
    """One operator's state and times; of a call that was answered also its tokens, fate and worker."""
    found = actual.status
    if actual.started_s is not None:
        found += f" {actual.started_s:.2f}-{'…' if actual.finished_s is None else f'{actual.finished_s:.2f}'} s"
    if actual.fate is None:
        return found
    computed, output = ("?" if n is None else n for n in (actual.computed_tokens, actual.output_tokens))
    return f"{found}, new={computed} out={output} {actual.fate}{f' on {actual.worker}' if actual.worker else ''}"


def _worker_lines(
    plan: PhysicalPlan, k: int, name: str, actuals: Mapping[int, Actual] | None, max_lines: int
) -> list[str]:
    mine = [id_ for id_ in plan.rank if plan.placement[id_] == k]
    busy = sum(plan.solution.complete[plan.number[id_]] - plan.solution.begin[plan.number[id_]] for id_ in mine)
    share = busy / plan.solution.makespan if plan.solution.makespan else 0.0
    lines = [f"Worker {name}: {counted(len(mine), 'operator')}, busy {share:.0%} of the steps"]
    if mine:
        lines.append(f"  {'order':>5}  {'operator':<28} {'steps':>17} {'new':>7} {'out':>6} {'path':>8}")
    for id_ in mine[:max_lines]:
        j = plan.number[id_]
        operator = plan.graph.operators[id_]
        steps = f"{plan.solution.begin[j]:.1f}-{plan.solution.complete[j]:.1f}"
        line = (
            f"  {plan.rank[id_]:>5}  {operator.name:<28} {steps:>17} {plan.forecast.computed[id_]:>7.0f} "
            f"{plan.tree.lengths[id_]:>6.0f} {plan.problem.tail[j]:>8.1f}"
        )
        actual = actuals.get(id_) if actuals is not None else None
        if actual is not None:
            line += f"  (actual {_happened(actual)})"
        lines.append(line)
    if len(mine) > max_lines:
        lines.append(f"  … {len(mine) - max_lines:,} more")
    return lines
