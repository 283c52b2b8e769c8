"""The report, `docs/benchmarks.md`, from the result files: ``python -m benchmarks.report [--run full|quick]``.

Without ``--run`` it is regenerated from what is in ``benchmarks/results``. With ``--run`` the measurements are made
first: ``publish`` every campaign at its whole length (hours), ``full`` the main ones in half an hour, in the place of
those. ``quick`` leaves all that alone and writes a report of its own, `docs/benchmarks-quick.md`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
from rich.console import Console

from . import campaigns, overhead, sections, sections_sim, simulate, tables
from .campaign import RESULTS, execute, save
from .process import ROOT, stop_on_sigterm
from .sections_again import BEFORE, again
from .stats import Measurement

DOCUMENT = ROOT / "docs" / "benchmarks.md"
QUICK = ROOT / "docs" / "benchmarks-quick.md"
PLOTS = ROOT / "docs" / "benchmarks"

_HEAD = """# Benchmarks

Everything here is generated from result files by `python -m benchmarks.report` (in `.venv/bin`, as all commands
here), and measured by `python -m benchmarks.report --run publish`, or a part of it with `--only` (how many repeats,
systems and runs a table has is said with it: some were published with fewer than the command takes); `python -m
benchmarks.optimality`, `.planning`, `.calibrate`, `.replay` and `.gpu.run` are run by themselves. `make bench`
measures the main parts, shortened to half an hour, in their place; `make bench-quick` looks at the same shapes in
five minutes.

How it is measured: all systems of a table run on the same engines in one go, interleaved, in an order that rotates
from repeat to repeat; each is started fresh and the engines' prefix caches are dropped before every measurement.
The client is plain async code that puts replies into later prompts. `helium` is told by tags of which workflow, run
and node a call is, and what its parents are; `helium-untagged` is not, nor is any peer, unless that is said. Every
call asks for a reply of one fixed length (`max_tokens` with `ignore_eos`), so that all systems have the same work:
helium reads it there, whereas most agents' replies have lengths that it must estimate. *Best peer* is the fastest
system that is not helium-proxy on that shape, client-side round robin included. *Tokens ÷ fewest* is what the engines
computed of the prompts before their first tokens, by their own counters (prewarming that was not cut off included),
over the fewest that any schedule must compute: every distinct full block once and every distinct prompt's tail.
*Busiest ÷ mean* compares the workers' work (prompt tokens computed, and generated tokens at three times as much).
Figures are medians, ranges are lowest to highest. *Outputs differ* counts calls whose reply is not the direct run's.
"""

_SECTIONS: tuple[sections.Section, ...] = (
    sections.campaign_section(
        "vllm",
        "Six shapes on real vLLM",
        "Two real vLLM CPU engines (float32, greedy), the paper's six shapes. Engines, their API servers, proxy and "
        "client share two cores of a machine with neighbours, so that the ranges matter as much as the medians.",
    ),
    sections.campaign_section(
        "modes",
        "Six shapes on real vLLM: other modes, tags and plans",
        "The same engines and batches. `sglang-balanced` balances from 4 calls of difference on (by default 64, more "
        "than are in flight here); `vllm-router-kv` places by KV events; `vllm-router-program` is told which calls "
        "are of one program. `helium` is told the workflow, run, node and parents of every call, `helium-untagged` "
        "nothing, and to `helium-plan` the whole batch is submitted. Measured once, on a slower and busier machine "
        "than the campaign above, where the same system's times on one shape differed by a third from hour to "
        "hour: it is the tokens that can be compared here.",
    ),
    sections.campaign_section(
        "h100",
        "Six shapes on eight engines at an H100's rates",
        "Embedded engines behind the same real peers. Their rates are a roofline of published figures, here slowed "
        "down where the setting says so, lest two cores be too few for eight engines, their HTTP servers, proxy and "
        "client: the times are not a GPU's.",
    ),
    sections.campaign_section(
        "two_day",
        "Two-day Trading",
        "On the second day all inputs are as before for half of the companies, and the fundamentals for all.",
    ),
    sections.campaign_section(
        "agents",
        "Agent traffic that the paper lacks",
        "Tool loops with think times, tree search with pruned branches, retrieval over shared documents, mixed "
        "tenants, open-loop arrivals.",
    ),
    sections.ablation,
    sections.starvation,
    sections.campaign_section(
        "one_worker",
        "One worker that holds everything",
        "Nothing can be gained here; what is measured is what it costs to have the proxy in the way.",
    ),
    sections.predictions,
    sections.lookahead,
    sections.overhead,
    sections_sim.optimality,
    sections_sim.planning,
    sections_sim.calibration,
    again,
    sections_sim.simulator,
    sections_sim.paper,
)


def render(results: sections.Results) -> str:
    """The document; plots are written to `PLOTS`."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    parts = [section(results, PLOTS) for section in _SECTIONS]
    return "\n\n".join([_HEAD.strip(), *(part for part in parts if part), _gpu(results)]) + "\n"


_NUMERICS = (
    "In bfloat16 greedy replies change with the batch, and replies are parts of later prompts: *outputs differ* says "
    "nothing about the systems."
)
_PARTS = (
    "`python -m benchmarks.gpu.run --vllm-python PYTHON --mps --blocks 1024`, with `--batch`, `--systems` and "
    "`--repeats` for what is given below: stock vLLM (0.24, "
    "into which the pinning plugin is not loaded), random weights. One card stands for several: CUDA's Multi-Process "
    "Service gives each engine an equal part of its multiprocessors, so that none has what another "
    f"leaves idle; memory bandwidth is common. {_NUMERICS}"
)
_TURNS = (
    "`python -m benchmarks.gpu.run --vllm-python PYTHON --blocks 2048 --scale 1 --out gpu_shared`, batches that the "
    "engines hold. Engines "
    "that share a GPU so take turns on it: what one leaves idle the other has, so that balance is worth nothing, and "
    "a router that keeps to one engine decodes in fewer, larger batches."
)


def _gpu(results: sections.Results) -> str:
    if "gpu" not in results:
        return (
            "## On a GPU\n\n**Not run.** `python -m benchmarks.gpu.run` does it on a machine with a GPU and vLLM: "
            "two engines with random weights of Qwen3-8B's shape, the same harness."
        )
    parts = [
        sections.campaign_section("gpu", "On a GPU", _PARTS)(results, PLOTS),
        sections.campaign_section("gpu_shared", "On a GPU, engines that take turns", _TURNS)(results, PLOTS),
        sections.gpu_rates(results),
    ]
    return "\n\n".join(part for part in parts if part)


def load() -> sections.Results:
    """Every result file but the quick one, and those of an earlier day."""
    files = {path.stem: path for path in sorted(RESULTS.glob("*.json")) if path.stem != "quick"}
    files |= {BEFORE + path.stem: path for path in sorted((RESULTS / "before").glob("*.json"))}
    return {name: json.loads(path.read_text()) for name, path in files.items()}


def render_quick(results: sections.Results) -> str:
    """The same of the quick look."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    lead = (
        "One repeat of small batches on embedded engines: a look at what the published campaigns measure, on this "
        "machine. Batches as small as these end in the critical path, and figures move by 10% from run to run."
    )
    parts = (sections.campaign_section("quick", "Six shapes, quickly", lead), sections.overhead)
    return "\n\n".join([_HEAD.strip(), *(section(results, PLOTS) for section in parts)]) + "\n"


def measure(kind: str, only: Sequence[str] | None, console: Console) -> sections.Results:
    """Make the measurements of `kind`, or those of them that `only` names, and save them."""
    results: sections.Results = {}
    campaign_sets = {"quick": campaigns.quick(), "full": campaigns.FULL, "publish": campaigns.CAMPAIGNS}
    for name, campaign in campaign_sets[kind].items():
        if only is not None and name not in only:
            continue
        console.rule(name)
        result = asyncio.run(execute(campaign, console, partial(save, name=name)))
        tables.show(console, [Measurement(**m) for m in result["measurements"]])
        for note in result["notes"]:
            console.print(f"[yellow]{note}")
        save(result, name)
        results[name] = result
    if only is None or "overhead" in only:
        console.rule("overhead")
        names = ["bare", "helium"] if kind == "quick" else ["direct", "bare", "helium", "vllm-router", "litellm"]
        repeats, seconds = {"quick": (1, 2.0), "full": (2, 3.0), "publish": (3, 3.0)}[kind]
        found = asyncio.run(overhead.run(names, repeats, seconds, console))
        overhead.show(console, found)
        results["overhead"] = found
        if kind != "quick":
            save(found, "overhead")
    if kind != "quick" and (only is None or "simulate" in only):
        console.rule("simulate")
        save(simulate.run(console, runs=32 if kind == "full" else 64, calls=100_000, limit_s=120.0), "simulate")
    return results


@click.command()
@click.option("--run", "kind", type=click.Choice(["full", "quick", "publish"]), help="Measure first.")
@click.option("--only", help="Comma list of campaigns: measure these alone ('overhead' is one).")
def main(kind: str | None, only: str | None) -> None:
    """Regenerate the report; with --run, measure first."""
    stop_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 190)
    began = time.monotonic()
    found = measure(kind, only.split(",") if only else None, console) if kind is not None else {}
    document: Path = QUICK if kind == "quick" else DOCUMENT
    document.write_text(render_quick(found) if kind == "quick" else render(load()))
    console.print(f"wrote {document.relative_to(ROOT)} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
