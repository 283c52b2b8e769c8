"""The report's sections: each a function of the result files, to Markdown. No figure is written by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from . import plots
from .stats import Measurement, Row, best_peers, geometric_mean, rows, speedups

Results = dict[str, dict[str, Any]]
"""Result file's name without its ending -> its content."""

Section = Callable[[Results, Path], str]
"""(results, folder for plots) -> Markdown; empty when the results it needs are not there."""


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join(lines)


def table_of(result: dict[str, Any]) -> list[Row]:
    return rows([Measurement(**measured) for measured in result["measurements"]])


def _kv(about: dict[str, Any]) -> str:
    size, divisor = about["block_size"], about["campaign"]["kv_divisor"]
    if divisor is None:
        return f"{about['num_blocks']} KV blocks of {size} tokens ({about['num_blocks'] * size:,})"
    counts = ", ".join(f"{shape.replace('_', ' ')} {blocks:,}" for shape, blocks in about["blocks"].items())
    return f"KV for its part of 1/{divisor:g} of the batch's working set (blocks of {size} tokens: {counts})"


def engines_of(about: dict[str, Any]) -> str:
    """The engines of a campaign, in a few words."""
    if "cards" not in about:
        return f"`{about['campaign']['engines']}`"
    places = about["gpus"].split(",")
    shared = "sharing" if len(set(places)) < len(places) else "on"
    if about.get("mps"):
        shared = "with an equal part each (MPS) of"
    cards = " and ".join(about["cards"]) or "no GPU"
    return f"{len(places)} × {about['engine_versions'][0]} ({about['model']}) {shared} {cards}"


def setting(result: dict[str, Any]) -> str:
    """Where and how a campaign ran, in a sentence or two."""
    about = result["about"]
    campaign, sizes = about["campaign"], about["prompt_sizes"]
    options = campaign["options"]
    speed = ""
    if campaign["engines"].startswith("embedded"):
        scale = "" if options["time_scale"] == 1.0 else f" at {options['time_scale']:g} of real time"
        speed = f", profile `{options['profile']}`{scale}"
    counts = Counter((m["shape"], m["system"], m["phase"]) for m in result["measurements"]).values()
    repeats = "–".join(str(count) for count in sorted({min(counts, default=0), max(counts, default=0)}))
    repeats = "One repeat" if repeats == "1" else f"{repeats} interleaved repeats"
    extra = " ".join(f"`{argument}`" for argument in about.get("engine_args", ()))
    runs = {m["shape"].replace("_", " "): m["runs"] for m in result["measurements"]}
    batches = ", ".join(f"{shape} {count}" for shape, count in runs.items())
    names = dict.fromkeys(m["system"] for m in result["measurements"] if m["family"] != "helium")
    peers = ", ".join("client-side round robin (`rr`)" if name == "rr" else f"`{name}`" for name in names)
    pins = [
        pin
        for pinned in about.get("peers", {}).values()
        for pin in pinned
        if any(pin.startswith(n[:6]) for n in names)
    ]
    peers += f" ({', '.join(pins)})" if pins else ""
    return (
        f"Engines: {engines_of(about)}{speed}, each with {_kv(about)}{extra and f', started with {extra}'}. "
        f"Prompts in tokens: static {sizes['static']}, context "
        f"{sizes['context']}, question {sizes['question']}, output {sizes['output']}. "
        f"Runs in a batch: {batches}. {f'Peers: {peers}. ' if peers else ''}{repeats}. "
        f"{about['cpu']}, {about['cores']} cores; {about['date'][:10]}, commit `{about['commit']}`."
    )


def _name(shape: str, phase: int) -> str:
    name = shape.replace("_", " ")
    return name if phase == 0 else f"{name}, day {phase + 1}"


def _cell(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _whole(table: Sequence[Row]) -> str:
    ratios = speedups(table)
    body = []
    for row in table:
        ratio = ratios.get(row.system, {}).get((row.shape, row.phase))
        name = f"**{row.system}**" if row.family == "helium" else row.system
        differ = "–" if row.outputs_differ is None else str(row.outputs_differ)
        body.append(
            [
                _name(row.shape, row.phase),
                name,
                f"{row.makespan:.2f} ({row.makespan_low:.2f}–{row.makespan_high:.2f})",
                _cell(ratio),
                _cell(row.run_p95),
                f"{_cell(row.call_p50)} / {_cell(row.call_p95)}",
                _cell(row.ttft_p50),
                _cell(row.over_minimum),
                _cell(row.balance),
                f"{row.preemptions:.0f}",
                differ,
                _cell(row.proxy_cpu, 1),
            ]
            + ([f"{row.failed_calls} calls failed"] if row.failed_calls else [""])
        )
    head = ["shape", "system", "makespan s (range)", "× best peer", "run p95 s", "call p50 / p95 s", "TTFT p50 s"]
    head += ["tokens ÷ fewest", "busiest ÷ mean", "preempted", "outputs differ", "proxy CPU s", ""]
    return "<details><summary>All figures</summary>\n\n" + markdown_table(head, body) + "\n\n</details>"


def _predicted(measured: Sequence[Measurement], system: str) -> str:
    """How often what would be cached was predicted to within a block."""
    mine = [m for m in measured if m.system == system and m.predicted_calls]
    calls = sum(m.predicted_calls for m in mine)
    if not calls:
        return ""
    share = sum(m.predicted_within_block for m in mine) / calls
    return f"; cached tokens predicted to within one block for {100 * share:.1f}% of {calls:,} computed calls"


def _means(table: Sequence[Row], measured: Sequence[Measurement]) -> str:
    """One line per system of ours: geometric mean over the best peer, worst and best shape."""
    lines = []
    ours = dict.fromkeys(row.system for row in table if row.family == "helium")
    for system, by_shape in speedups(table).items():
        if system not in ours:
            continue
        worst = min(by_shape, key=lambda key: by_shape[key])
        best = max(by_shape, key=lambda key: by_shape[key])
        mine = [row for row in table if row.system == system]
        lines.append(
            f"- **{system}**: geometric mean **{geometric_mean(by_shape.values()):.2f} ×** over the best peer of "
            f"each shape, least {by_shape[worst]:.2f} × ({_name(*worst)}), most "
            f"{by_shape[best]:.2f} × ({_name(*best)}); tokens at most "
            f"{max(row.over_minimum for row in mine):.2f} × the fewest, busiest worker at most "
            f"{max(row.balance for row in mine):.2f} × the mean, "
            f"{max(row.preemptions for row in mine):.0f} preemptions{_predicted(measured, system)}."
        )
    return "\n".join(lines)


def _no_gain(table: Sequence[Row]) -> str:
    """Where ours is not ahead, plainly."""
    best = best_peers(table)
    lost = []
    for row in table:
        peer = best.get((row.shape, row.phase))
        if row.family == "helium" and peer is not None and peer.makespan < 1.02 * row.makespan:
            ratio = peer.makespan / row.makespan
            lost.append(f"{_name(row.shape, row.phase)} ({row.system}: {ratio:.2f} × over {peer.system})")
    return f"\nNo gain (within 2% of the best peer, or behind it): {'; '.join(lost)}." if lost else ""


def campaign_section(name: str, title: str, lead: str) -> Section:
    """The usual section of a campaign: setting, means, plots, all figures."""

    def section(results: Results, folder: Path) -> str:
        if name not in results:
            return f"## {title}\n\n{lead}\n\nNot measured in this run."
        result = results[name]
        table, measured = table_of(result), [Measurement(**m) for m in result["measurements"]]
        plots.bars(table, "makespan", "makespan, s", folder / f"{name}-makespan.svg")
        plots.bars(table, "over_minimum", "prompt tokens ÷ fewest", folder / f"{name}-tokens.svg", line=1.0)
        notes = "".join(f"\n- {note}" for note in result["notes"])
        return (
            f"## {title}\n\n{lead}\n\n{setting(result)}\n\n{_means(table, measured)}{_no_gain(table)}\n\n"
            f"![makespan](benchmarks/{name}-makespan.svg)\n\n![tokens computed](benchmarks/{name}-tokens.svg)\n\n"
            f"{_whole(table)}" + (f"\n\nNotes:{notes}" if notes else "")
        )

    return section


def ablation(results: Results, folder: Path) -> str:
    """What each part is worth: makespans relative to everything on."""
    if "ablation" not in results:
        return ""
    table = table_of(results["ablation"])
    base = {(row.shape, row.phase): row for row in table if row.system == "helium"}
    systems = [s for s in dict.fromkeys(row.system for row in table) if s != "helium"]
    shapes = list(base)
    body = []
    for system in systems:
        cells = [system]
        for key in shapes:
            row = next((r for r in table if r.system == system and (r.shape, r.phase) == key), None)
            cells.append(
                "–"
                if row is None
                else f"{100 * (row.makespan / base[key].makespan - 1):+.0f}%, {row.over_minimum:.2f}"
            )
        body.append(cells)
    head = ["without", *(f"{shape.replace('_', ' ')}: makespan, tokens ÷ fewest" for shape, _ in shapes)]
    return (
        "## What each part is worth\n\nMakespan relative to everything on (tagged), one switch turned off at a time; "
        f"with everything on, tokens ÷ fewest are {', '.join(_cell(base[key].over_minimum) for key in shapes)}. "
        f"{setting(results['ablation'])}\n\n{markdown_table(head, body)}"
    )


def starvation(results: Results, folder: Path) -> str:
    """How long a small call waits in the stream of a large workflow."""
    if "starvation" not in results:
        return ""
    measured = [Measurement(**m) for m in results["starvation"]["measurements"]]
    waits = small_call_waits(results["starvation"])
    body = [
        [system, f"{median(seen):.2f}" + (f" ({min(seen):.2f}–{max(seen):.2f})" if len(seen) > 1 else "")]
        for system, seen in waits.items()
    ]
    ratio = small_call_ratio(results["starvation"])
    return (
        "## A small call beside a large workflow\n\nMap-Reduce runs arrive faster than they can be served, and every "
        f"fourth run is one small single call: {measured[0].runs // 4} in a repeat. Their latency, p95 within a "
        f"repeat: helium's is {ratio:.2f} × that of first in, first out (`helium-no-ordering`). "
        f"{setting(results['starvation'])}\n\n{markdown_table(['system', 'single call p95 s'], body)}"
    )


def small_call_waits(result: dict[str, Any]) -> dict[str, list[float]]:
    """System -> the small calls' p95 in each repeat, in seconds."""
    measured = [Measurement(**m) for m in result["measurements"]]
    return {
        system: [m.tenants["single"]["run_p95"] for m in measured if m.system == system and m.tenants]
        for system in dict.fromkeys(m.system for m in measured)
    }


def small_call_ratio(result: dict[str, Any]) -> float:
    """helium's over that of first in, first out."""
    waits = small_call_waits(result)
    fifo = waits.get("helium-no-ordering")
    return median(waits["helium"]) / median(fifo) if fifo else math.nan


def predictions(results: Results, folder: Path) -> str:
    """How often what would be cached was known, with the engines' KV events and without."""
    if "predictions" not in results:
        return ""
    measured = [Measurement(**m) for m in results["predictions"]["measurements"]]
    shapes = list(dict.fromkeys(m.shape for m in measured))

    def share(system: str, names: Sequence[str]) -> str:
        mine = [m for m in measured if m.system == system and m.shape in names]
        calls = sum(m.predicted_calls for m in mine)
        within = sum(m.predicted_within_block for m in mine)
        return f"{100 * within / calls:.1f}% of {calls:,}" if calls else "–"

    body = [
        [label, share("helium", names), share("helium-no-events", names)]
        for label, names in [*((shape.replace("_", " "), [shape]) for shape in shapes), ("all", shapes)]
    ]
    head = ["shape", "with KV events", "without"]
    return (
        "## What is known of the engines' caches\n\nComputed calls whose cached tokens were predicted to within one "
        f"block. {setting(results['predictions'])}\n\n{markdown_table(head, body)}"
    )


def gpu_rates(results: Results) -> str:
    """One engine alone on a GPU beside the simulator's profile of it."""
    if "gpu_rates" not in results:
        return ""
    about, rows = results["gpu_rates"]["about"], results["gpu_rates"]["rows"]
    body = [
        [name, f"{row['measured_s']:.3f}", f"{row['simulated_s']:.3f}", f"{row['error']:+.0%}"]
        for name, row in rows.items()
    ]
    table = markdown_table(["calls × (prompt + output)", "measured s", "simulated s", "error"], body)
    return (
        f"## The simulator's `{about['profile']}` against the card\n\n`python -m benchmarks.gpu.rates --vllm-python "
        "PYTHON`: the profile "
        "is a roofline of published rates and stated efficiencies, fitted to nothing. Here one engine has the whole "
        f"card; calls start together, share no prefix, and are timed at the client: {about['engine_versions'][0]} "
        f"({about['model']}, with a vocabulary of 8,192) on "
        f"{' and '.join(about['cards']) or 'no GPU'}; {about['date'][:10]}.\n\n{table}"
    )


def lookahead(results: Results, folder: Path) -> str:
    """Time to first token with and without prefilling while the client thinks."""
    if "lookahead" not in results:
        return ""
    measured = [Measurement(**m) for m in results["lookahead"]["measurements"]]

    def of(system: str, shape: str, field: str) -> float:
        values: list[float | None] = [getattr(m, field) for m in measured if (m.system, m.shape) == (system, shape)]
        return median([value for value in values if value is not None] or [math.nan])

    body = []
    for shape in dict.fromkeys(m.shape for m in measured):
        first_on, first_off, call_on, call_off = (
            of(system, shape, field)
            for field in ("ttft_follows_p50", "call_p95")
            for system in ("helium", "helium-no-lookahead")
        )
        body.append(
            [
                shape.replace("_", " "),
                f"{first_off:.3f}",
                f"{first_on:.3f}",
                f"{first_off / first_on:.2f} ×",
                f"{call_off:.2f}",
                f"{call_on:.2f} ({call_on / call_off - 1:+.0%})",
            ]
        )
    head = ["shape", "TTFT p50 s without", "with", "ratio", "call p95 s without", "with"]
    return (
        "## While the client thinks\n\nThe client pauses for half a second before every call that has parents; the "
        "template, learned from three runs, says what comes, and its prefix is prefilled meanwhile. TTFT is that of "
        "the calls that have parents: before a run's first calls nothing is known. Only what the engine does not "
        "hold can be gained: the other agents' replies, and its own where their text is not cut into the tokens that "
        "it generated, which random weights bring about more often than trained ones. "
        f"{setting(results['lookahead'])}\n\n{markdown_table(head, body)}"
    )


def overhead(results: Results, folder: Path) -> str:
    if "overhead" not in results:
        return "## Overhead\n\nNot measured in this run."
    result = results["overhead"]
    summary = result["summary"]
    body = [
        [
            f"**{name}**" if name == "helium" else name,
            f"{row['rate']:,.0f}",
            f"{row['single_p50_ms']:.2f}",
            f"{row['added_p50_ms']:+.2f}",
            f"{row['chunk_p50_ms']:.3f}",
            f"{row['chunk_added_p50_ms']:+.3f}",
        ]
        for name, row in summary.items()
    ]
    head = ["system", "requests/s, 32 connections", "p50 ms, 1 connection", "added ms"]
    head += ["chunk's age p50 ms", "added ms"]
    lines = []
    if "helium" in summary and "bare" in summary:
        ours, bare = summary["helium"], summary["bare"]
        lines.append(
            f"Against the bare proxy: {ours['rate'] / bare['rate']:.0%} of its requests/s, "
            f"{ours['single_p50_ms'] - bare['single_p50_ms']:+.2f} ms at one connection, "
            f"{ours['chunk_p50_ms'] - bare['chunk_p50_ms']:+.3f} ms a chunk."
        )
        if "helium-passthrough" in summary:
            lines.append(
                f"In passthrough mode, which neither tracks, estimates nor queues: "
                f"{summary['helium-passthrough']['rate'] / bare['rate']:.0%} of its requests/s."
            )
    if "helium" in summary and "litellm" in summary:
        lines.append(f"{summary['helium']['rate'] / summary['litellm']['rate']:.0f} × LiteLLM's requests/s.")
    for sample in result["samples"]:
        if sample["memory_mib"]:
            early, late = sample["memory_mib"]
            lines.append(f"Resident memory: {early:.0f} MiB after 1,000 calls, {late:.0f} MiB after 10,000.")
    about = result["about"]
    return (
        "## Overhead\n\nOne zero-latency upstream, bodies of 4 kB, one process each, interleaved; every call tagged "
        "and unlike any other, all features on. The upstream is one worker that publishes no KV events and whose "
        "model has no tokenizer here: blocks are of text, and no prompt is tokenized, which takes some more (*proxy "
        "CPU s* in the tables above has it). Load generator, upstream and proxy share the machine's "
        f"{about['cores']} cores. Streams: 64 at 50 chunks/s. Medians of {about['campaign']['repeats']} repeats, "
        f"{about['date'][:10]}, commit `{about['commit']}`.\n\n{markdown_table(head, body)}\n\n{' '.join(lines)}"
    )
