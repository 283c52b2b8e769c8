"""Run the frameworks' programs against the recording server and compare what was inferred with the truth.

    PYTHONPATH=tests python -m frameworks.measure [NAME…] [--quick] [--docs]

Each program plays its four workflows, three times at once: with two topics, and with the first topic once more as
another tenant, so that runs of the same workflow interleave, and equal text goes on next door. ``--quick`` runs
one of the three; ``--docs`` writes the table into ``docs/tagging.md``,
from the latest measurement of each framework.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .build_env import REQUIREMENTS, ROOT, failure_of, python_of
from .server import Recorder, serving
from .truth import TRUTH, Edge, Score, edge_score, grouped

PROGRAMS = Path(__file__).parent / "programs"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "tagging.md"
TOPICS = ("tidal power in Brittany", "night trains between capitals")
_BEGIN, _END = "<!-- frameworks:begin -->", "<!-- frameworks:end -->"


@dataclass
class Result:
    """One framework's figures, and what went wrong in it."""

    score: Score
    details: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **kept,
        "OPENAI_API_KEY": "none",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "CREWAI_DISABLE_TELEMETRY": "true",
        "CREWAI_TRACING_ENABLED": "false",
        "OTEL_SDK_DISABLED": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONWARNINGS": "ignore",
    }


JOBS = (("a", 0), ("a", 1), ("b", 0))
"""(tenant, topic) of the processes that run at once."""


def run_programs(
    name: str, recorder: Recorder, jobs: Sequence[tuple[str, int]] = JOBS, timeout_s: float = 300.0
) -> list[str]:
    """Run every workflow of one framework; returns the errors of programs that failed."""
    errors = []
    with serving(recorder) as url:
        running = []
        for tenant, at in jobs:
            program = PROGRAMS / f"{name}_program.py"
            command = [str(python_of(name)), str(program), url, tenant, str(at), TOPICS[at]]
            process = subprocess.Popen(
                command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            running.append((f"{name} {tenant}.{at}", process))
        for label, process in running:
            try:
                _, error = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                _, error = process.communicate()
                error = f"timed out\n{error}"
            if process.returncode:
                errors.append(f"{label}: {error.strip()[-1500:]}")
    return errors


def compare(recorder: Recorder) -> Result:
    """Hold what was inferred against the truth."""
    seen = {item.call: item for item in recorder.seen}
    nodes: dict[str, str] = {}
    found: dict[str, list[Edge]] = {}
    foreign = 0
    details = []
    workflows = recorder.workflows
    wrong_runs: list[Edge] = []
    for summary in workflows.runs(limit=10_000):
        run = workflows.run(summary["run"])
        assert run is not None
        for node in run["nodes"]:
            nodes[node["call"]] = node["node"].partition("#")[0]
        for edge in run["edges"]:
            source, target = seen[edge["from"]], seen[edge["to"]]
            if source.tenant != target.tenant:
                foreign += 1
            if source.label != target.label:
                wrong_runs.append((f"{source.label}:{source.role}", f"{target.label}:{target.role}"))
            else:
                found.setdefault(source.label, []).append((source.role, target.role))
    score = Score(wrong=len(wrong_runs), foreign=foreign)
    details += [f"between runs: {source} > {target}" for source, target in wrong_runs]
    for label in sorted({item.label for item in recorder.seen}):
        tenant, scenario, _ = label.split(".")
        edges = set(found.get(label, ()))
        truth = TRUTH[scenario]
        score += edge_score(edges, truth)
        details += [f"{label} wrong {a} > {b}" for a, b in sorted(edges - truth.required - truth.allowed)]
        details += [f"{label} missed {a} > {b}" for a, b in sorted(truth.required - edges)]
    for tenant in ("a", "b"):
        for scenario in TRUTH:
            pairs = [
                (item.role.partition("#")[0], nodes[item.call])
                for item in recorder.seen
                if item.label.startswith(f"{tenant}.{scenario}.")
            ]
            good = grouped(pairs)
            score += Score(grouped=good, calls=len(pairs))
            if good < len(pairs):
                details.append(f"{tenant}.{scenario} nodes {sorted(set(pairs))}")
    return Result(score, details)


def measure(name: str, jobs: Sequence[tuple[str, int]] = JOBS) -> Result:
    """Run one framework's programs; an incomplete run shows in `errors`."""
    recorder = Recorder()
    errors = run_programs(name, recorder, jobs)
    result = compare(recorder)
    result.errors = errors
    return result


def table(results: dict[str, Result | str]) -> str:
    lines = [
        "| framework | calls | edges: precision | recall | nodes grouped rightly | edges between tenants |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if isinstance(result, str):
            lines.append(f"| {name} | not measured: {result.splitlines()[0][:80]} | | | | |")
            continue
        score = result.score
        lines.append(
            f"| {name} | {score.calls} | {score.precision:.3f} | {score.recall:.3f} | {score.grouping:.3f} "
            f"| {score.foreign} |"
        )
    return "\n".join(lines)


def write_docs(text: str) -> None:
    page = DOCS.read_text()
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    DOCS.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


def stored(name: str) -> Result | str:
    """The latest measurement of a framework on this machine."""
    kept = ROOT / f"{name}.score.json"
    return Result(Score(**json.loads(kept.read_text()))) if kept.exists() else "not run"


def main(arguments: list[str]) -> int:
    names = [name for name in arguments if not name.startswith("-")] or list(REQUIREMENTS)
    results: dict[str, Result | str] = {}
    for name in names:
        reason = failure_of(name)
        if reason is not None:
            results[name] = reason
            continue
        result = results[name] = measure(name, JOBS[:1] if "--quick" in arguments else JOBS)
        print(name, result.score)
        if not result.errors and "--quick" not in arguments:
            (ROOT / f"{name}.score.json").write_text(json.dumps(asdict(result.score)))
        for line in (*result.details, *result.errors):
            print("   ", line)
    text = table(results)
    print(text)
    if "--docs" in arguments:
        write_docs(table({name: results.get(name) or stored(name) for name in REQUIREMENTS}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
