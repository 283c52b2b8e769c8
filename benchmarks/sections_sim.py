"""The report's sections on the simulator and how far it can be trusted, on planning and on the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import plots
from .sections import Results, engines_of, markdown_table, table_of
from .stats import geometric_mean, speedups
from .workloads import PAPER_SHAPES

_SWEEPS = {
    "workers": ("Workers, with as many runs per worker", "workers", True),
    "kv": ("KV capacity", "KV ÷ working set", True),
    "batch": ("Batch size", "runs at once", True),
    "fan-out": ("Fan-out (Map-Reduce)", "experts", True),
    "think": ("Think time before each call", "seconds, mean", False),
    "arrivals": ("Arrival rate, open loop", "share of round robin's capacity", False),
}


def simulator(results: Results, folder: Path) -> str:
    """Sweeps, the cost of deciding, the large fleet."""
    if "simulate" not in results:
        return "## Past this machine's size\n\nNot measured in this run."
    found = results["simulate"]
    base = found["base"]
    measured = "; ".join(
        f"{part} {about['date'][:10]}, commit `{about['commit']}`" for part, about in found.get("about", {}).items()
    )
    parts = [
        "## Past this machine's size\n\nIn virtual time: the embedded engine's scheduler at an H100's rates and the "
        f"real dispatch policy. Base point: {base['workers']} engines, {base['runs']} runs of {base['shape']} at "
        f"once, prompt sizes {base['sizes']}, KV for a sixth of the working set (400 blocks at the least). "
        "`affinity` is longest-prefix-first with a bound on imbalance, as the peers' cache-aware policies decide. It "
        "is kinder than life: hints are those of a template that has seen many runs, from the first call on; lengths "
        "of replies are known, as they are where clients ask for a fixed one; the engines' rates are known, and what "
        "they cache, as their KV events tell it; in the sweeps an answer is there at once. The profile's prefill is "
        "slower than that of the card measured below, so that a token saved is worth more."
        + (f" Measured: {measured}." if measured else "")
    ]
    points = found.get("points", [])
    for sweep, (title, label, log_x) in _SWEEPS.items():
        chosen = [point for point in points if point["sweep"] == sweep]
        if chosen:
            parts.append(_sweep(sweep, title, label, chosen, folder, log_x=log_x))
    if "shapes" in found:
        parts.append(_shapes("Six shapes, and what each part is worth", "", found["shapes"]))
    if "cards" in found:
        lead = "The same where each engine has 25,000 blocks of KV, as a card of 80 GB has beside a model of 8B. "
        parts.append(_shapes("Six shapes in a whole card's KV", lead, found["cards"]))
    if "decide" in found:
        parts.append(_decide(found["decide"], folder))
    if "fleet" in found:
        body = [
            [
                system,
                f"{row['calls']:,}",
                f"{row['makespan']:,.0f}",
                f"{row['wall_s']:.0f}",
                f"{row['run_p50']:.1f} / {row['run_p95']:.1f}",
                f"{row['balance']:.2f}",
                f"{row['preemptions']:,}",
                f"{row['decide_us']:.0f}",
            ]
            for system, row in found["fleet"].items()
        ]
        head = ["policy", "calls", "simulated s", "took s", "run p50 / p95 s", "busiest ÷ mean", "preempted"]
        table = markdown_table([*head, "µs of deciding a call"], body)
        parts.append(f"### 64 workers, 1,000 runs at a time\n\n{table}")
    return "\n\n".join(parts)


def _sweep(sweep: str, title: str, label: str, points: Sequence[dict[str, Any]], folder: Path, *, log_x: bool) -> str:
    field = "run_p95" if sweep == "arrivals" else "makespan"
    systems = list(dict.fromkeys(point["system"] for point in points))
    series = {
        system: [(point["x"], point[field]) for point in points if point["system"] == system] for system in systems
    }
    name = f"simulate-{sweep}.svg"
    ylabel = "run p95, s" if sweep == "arrivals" else "makespan, s"
    plots.lines(series, xlabel=label, ylabel=ylabel, path=folder / name, log_x=log_x)
    xs = sorted({point["x"] for point in points})
    by_key = {(point["x"], point["system"]): point for point in points}
    body = []
    for x in xs:
        row = [f"{x:.3g}"]
        for system in systems:
            point = by_key[x, system]
            over = point["computed_tokens"] / max(1, point["fewest_tokens"])
            row.append(f"{point[field]:.2f} s, {over:.2f} × fewest, busiest {point['balance']:.2f}")
        best = min(by_key[x, system][field] for system in systems if system != "helium")
        row.append(f"{best / by_key[x, 'helium'][field]:.2f}")
        body.append(row)
    table = markdown_table([label, *systems, "helium × best"], body)
    details = f"<details><summary>Figures</summary>\n\n{table}\n\n</details>"
    return f"### {title}\n\n![{title}](benchmarks/{name})\n\n{details}"


def _shapes(title: str, lead: str, points: Sequence[dict[str, Any]]) -> str:
    by_key = {(point["shape"], point["system"]): point for point in points}
    shapes = list(dict.fromkeys(point["shape"] for point in points))
    systems = list(dict.fromkeys(point["system"] for point in points))
    others = [system for system in systems if not system.startswith("helium")]
    best = {shape: min(by_key[shape, system]["makespan"] for system in others) for shape in shapes}
    body = []
    for system in systems:
        row = [system]
        ratios = []
        for shape in shapes:
            point = by_key[shape, system]
            ratios.append(best[shape] / point["makespan"])
            row.append(f"{ratios[-1]:.2f} ×, {point['computed_tokens'] / max(1, point['fewest_tokens']):.2f}")
        body.append([*row, f"{geometric_mean(ratios):.2f} ×"])
    table = markdown_table(["policy", *(shape.replace("_", " ") for shape in shapes), "geometric mean"], body)
    return (
        f"### {title}\n\n{lead}Faster than the better of `rr` and `affinity` on the shape, and tokens computed ÷ "
        "fewest. Answers need 5 ms on average from the scheduler to the client, who then sends the next call. "
        "`helium-guessing` guesses the lengths of replies, off by a factor of 1.65 or more for a third of them; "
        f"`helium-no-…` is the policy with that part turned off.\n\n{table}"
    )


def _decide(points: Sequence[dict[str, Any]], folder: Path) -> str:
    by_queue = [(p["queue"], p["median_us"] / 1e3) for p in points if p["workers"] == 16]
    p99_queue = [(p["queue"], p["p99_us"] / 1e3) for p in points if p["workers"] == 16]
    by_workers = [(p["workers"], p["median_us"] / 1e3) for p in points if p["queue"] == 2_000]
    p99_workers = [(p["workers"], p["p99_us"] / 1e3) for p in points if p["queue"] == 2_000]
    plots.lines(
        {"helium median": by_queue, "helium p99": p99_queue},
        xlabel="calls queued, 16 workers",
        ylabel="ms a decision",
        path=folder / "decide-queue.svg",
        log_x=True,
    )
    plots.lines(
        {"helium median": by_workers, "helium p99": p99_workers},
        xlabel="workers, 2,000 calls queued",
        ylabel="ms a decision",
        path=folder / "decide-workers.svg",
        log_x=True,
    )
    body = [
        [str(p["workers"]), f"{p['queue']:,}", f"{p['median_us'] / 1e3:.2f}", f"{p['p99_us'] / 1e3:.2f}"]
        for p in points
    ]
    table = markdown_table(["workers", "queued", "median ms", "p99 ms"], body)
    return (
        "### What a decision costs\n\nAll workers busy, one call just finished.\n\n"
        "![by queue](benchmarks/decide-queue.svg) ![by workers](benchmarks/decide-workers.svg)\n\n"
        f"<details><summary>Figures</summary>\n\n{table}\n\n</details>"
    )


def optimality(results: Results, folder: Path) -> str:
    if "optimality" not in results:
        return ""
    found = results["optimality"]["summary"]
    return (
        "## Optimality\n\nSubmitted plans' schedules against a MILP of the same cost model (HiGHS) on "
        f"{found['instances']} small instances of four to nine operators ({found['proven']} solved to proven "
        f"optimality): gap on average "
        f"{100 * found['gap_mean']:.2f}%, at most {100 * found['gap_max']:.2f}% (the paper's: 0.9% and 3.6%); the "
        f"greedy solver alone {100 * found['greedy_gap_mean']:.1f}% and {100 * found['greedy_gap_max']:.1f}%."
    )


def calibration(results: Results, folder: Path) -> str:
    if "calibration" not in results:
        return ""
    found = results["calibration"]
    errors = [abs(point["error"]) for point in found["fitted_to"].values() if "error" in point]
    text = (
        "## How far the embedded engine can be trusted\n\nFitted to a real vLLM CPU engine "
        f"({found['engine']['vllm']}): the times of the batches that it was fitted to within "
        f"{100 * max(errors):.0f}% at worst, {100 * sorted(errors)[len(errors) // 2]:.0f}% at the median."
    )
    if "replay" in results:
        replay = results["replay"]
        body = [
            [
                shape.replace("_", " "),
                str(row["calls"]),
                f"{min(row['measured_s']):.2f}; {max(row['measured_s']):.2f}",
                f"{row['simulated_s']:.2f}",
                f"{row['error']:+.0%}",
                f"{row['shipped_s'] / min(row['measured_s']) - 1:+.0%}",
                f"{min(row['computed_tokens']):,.0f}",
                f"{row['simulated_tokens']:,}",
            ]
            for shape, row in replay["shapes"].items()
        ]
        about = replay["about"]
        campaign = about["campaign"]
        text += (
            "\n\nThe six shapes on one real engine without a proxy, and the very same calls, by token ids, on the "
            "embedded engine's scheduler in virtual time (`python -m benchmarks.replay`): at rates fitted to "
            "other batches that ran in turns with them, and at those of the `cpu-tiny` profile, fitted on another "
            f"day. {campaign['repeats']} repeats, of which the fastest counts, since neighbours can only slow the "
            f"real one down. {about['cpu']}, {about['cores']} cores; {about['date'][:10]}, "
            f"commit `{about['commit']}`.\n\n"
        )
        head = ["shape", "calls", "real s (fastest; slowest)", "simulated s", "error", "error of `cpu-tiny`"]
        head += ["tokens computed", "simulated"]
        text += markdown_table(head, body)
    return text


def planning(results: Results, folder: Path) -> str:
    """How long planning takes, and what its schedules are worth."""
    if "planning" not in results:
        return ""
    body = [
        [
            f"{row['inputs']} ({row['calls']:,} calls)",
            str(row["workers"]),
            f"{row['cpu_ms_least']:.0f}",
            f"{row['wall_ms_least']:.0f}",
            f"{row['makespan_over_bound']:.2f}",
            f"{row['hit_rate']:.2f} of {row['best_possible_hit_rate']:.2f}",
        ]
        for row in results["planning"]
    ]
    head = ["inputs", "workers", "CPU ms", "wall ms", "makespan ÷ lower bound", "hit rate of the possible"]
    return (
        "## Planning\n\nTrading submitted as a plan (`python -m benchmarks.planning`), least of its repeats; the "
        "paper gives 230 ms for 16 inputs. The lower bound is of the critical path and of the work over the workers, "
        f"and may be out of reach.\n\n{markdown_table(head, body)}"
    )


_PRIMITIVE = "1.02–4.32 × over each framework; KVFlow, the closest, 1.32 × (1.14–1.56)"
_TRADING = "1.34 × (KVFlow)"


def paper(results: Results, folder: Path) -> str:
    """Its figures beside ours."""
    body = []
    for name in ("vllm", "h100", "gpu"):
        if name not in results:
            continue
        table = table_of(results[name])
        for system in dict.fromkeys(row.system for row in table if row.family == "helium"):
            ratio = speedups(table).get(system, {})
            primitive = [ratio[s, 0] for s in PAPER_SHAPES if s != "trading" and (s, 0) in ratio]
            where = f"{system}, {engines_of(results[name]['about'])}"
            if primitive:
                ours = f"{geometric_mean(primitive):.2f} × ({min(primitive):.2f}–{max(primitive):.2f})"
                body.append([f"five primitive shapes over the best peer: {where}", _PRIMITIVE, ours])
            if ("trading", 0) in ratio:
                body.append([f"Trading: {where}", _TRADING, f"{ratio['trading', 0]:.2f} ×"])
    if "optimality" in results:
        found = results["optimality"]["summary"]
        ours = f"{100 * found['gap_mean']:.2f}% / {100 * found['gap_max']:.2f}%"
        body.append(["optimality gap, average / largest", "0.9% / 3.6%", ours])
    if not body:
        return ""
    return (
        "## Beside the paper\n\nThe paper (arXiv 2603.16104) measures its own runtime with a patched vLLM 0.16 on "
        "two H100 NVL with Qwen3-8B/14B, against other *frameworks*; we measure a proxy in front of stock vLLM "
        "against other *routers*, on the engines named, with the same shapes and smaller prompts. The figures are "
        f"therefore not the same experiment.\n\n{markdown_table(['figure', 'paper', 'here'], body)}"
    )
