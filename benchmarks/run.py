"""Measure systems side by side: ``python -m benchmarks.run --help``."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import build_peers, engines, systems, tables
from .engines import EngineOptions
from .harness import Harness, Outputs, Plan, compare
from .process import ROOT, StartFailed
from .stats import Measurement
from .workloads import PAPER_SHAPES, SIZES, WORKLOADS

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Campaign:
    """Everything a benchmark run is told."""

    engines: str
    options: EngineOptions
    shapes: tuple[str, ...]
    systems: tuple[str, ...]
    sizes: str
    repeats: int
    batch: int | None
    scale: float
    seed: int
    time_scale: float
    stream_every: int
    warmup: int
    decode_cost: float


def order(names: Sequence[str], turn: int) -> list[str]:
    """The systems' order in this turn: rotated by one each time."""
    shift = turn % len(names)
    return [*names[shift:], *names[:shift]]


def describe(campaign: Campaign, spec: engines.Engines) -> dict[str, Any]:
    """What a reader must know to judge the figures."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.strip()
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ())
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "version": metadata.version("helium-proxy"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "peers": {name: list(pins) for name, pins in build_peers.REQUIREMENTS.items()},
        "engine_versions": list(engines.versions(campaign.engines)),
        "block_size": spec.block_size,
        "num_blocks": spec.num_blocks,
        "campaign": asdict(campaign),
        "prompt_sizes": asdict(SIZES[campaign.sizes]),
    }


async def execute(campaign: Campaign, console: Console) -> dict[str, Any]:
    """Run the whole campaign; the result file's content.

    Raises:
        StartFailed: engines did not come up. A *system* that does not is noted and left out.
    """
    chosen = {name: systems.find(name) for name in campaign.systems}
    build_peers.ensure({s.peer for s in chosen.values() if s.peer is not None})
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        console.print(f"starting {campaign.engines}")
        running = await engines.start(campaign.engines, campaign.options, session)
        try:
            harness = Harness(running, session)
            await harness.learn()
            measured, notes = await _measure_all(campaign, chosen, harness, console)
            about = describe(campaign, running) | {"tokens_per_word": harness.writer_scale}
        finally:
            running.close()
    return {"about": about, "notes": notes, "measurements": [m.to_json() for m in measured]}


async def _measure_all(
    campaign: Campaign, chosen: dict[str, systems.System], harness: Harness, console: Console
) -> tuple[list[Measurement], list[str]]:
    measured: list[Measurement] = []
    notes: list[str] = []
    left_out = {name for name, system in chosen.items() if system.needs_events and not harness.engines.events}
    notes += [f"{name} left out: the engines publish no KV events" for name in sorted(left_out)]
    total = campaign.repeats * len(campaign.shapes) * len(chosen)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        overall = bars.add_task("measurements", total=total)
        current = bars.add_task("calls", total=1)
        for repeat in range(campaign.repeats):
            for number, shape in enumerate(campaign.shapes):
                workload = WORKLOADS[shape]
                batch = campaign.batch or max(1, round(workload.batch * campaign.scale))
                plan = Plan(
                    workload=workload,
                    sizes=SIZES[campaign.sizes],
                    batch=batch,
                    seed=campaign.seed + repeat,
                    repeat=repeat,
                    time_scale=campaign.time_scale,
                    stream_every=campaign.stream_every,
                    warmup=campaign.warmup,
                    decode_cost=campaign.decode_cost,
                )
                outputs: dict[str, Outputs] = {}
                group: list[Measurement] = []
                for name in order(list(chosen), repeat + number):
                    system = chosen[name]
                    if name in left_out or (system.plan and not workload.planned):
                        bars.advance(overall)
                        continue
                    calls = workload.calls_per_run
                    bars.reset(current, total=calls * batch if calls else None, description=f"{shape} {name}")
                    began = time.perf_counter()
                    try:
                        results, outputs[name] = await harness.measure(
                            system, plan, lambda done: bars.update(current, completed=done)
                        )
                    except StartFailed as failure:
                        left_out.add(name)
                        notes.append(f"{name} left out: it did not start")
                        console.print(f"[red]{failure}")
                        continue
                    finally:
                        bars.advance(overall)
                    group += results
                    console.print(tables.line(results, time.perf_counter() - began))
                    for m in results:
                        if m.first_failure:
                            notes.append(f"{m.shape} {m.system} #{m.repeat}: {m.first_failure}")
                if outputs:
                    compare(outputs, group)
                measured += group
    return measured, notes


def save(result: dict[str, Any], name: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


@click.command()
@click.option("--engines", "spec", default="embedded:2", help="embedded:N, vllm:N or a comma list of URLs.")
@click.option("--profile", default="cpu-tiny", help="The embedded engine's speed.")
@click.option("--blocks", default=96, help="KV blocks per engine.")
@click.option("--block-size", type=int, help="Tokens per KV block; default: the engine's.")
@click.option("--engine-time-scale", default=1.0, help="Embedded engine: its seconds per real second.")
@click.option("--kv-events/--no-kv-events", default=False, help="Engines publish KV events.")
@click.option("--plugin", is_flag=True, help="Real vLLM with the pinning connector.")
@click.option("--engine-arg", "extra", multiple=True, help="One more argument to the engines' command.")
@click.option("--shapes", default="paper", help="Comma list; 'paper': its six; 'all'.")
@click.option("--systems", "names", default="rr,helium", help="Comma list; helium+KEY=VALUE adds a setting.")
@click.option("--sizes", default="small", type=click.Choice(list(SIZES)), help="Prompt sizes.")
@click.option("--repeats", default=3, help="Interleaved repeats.")
@click.option("--batch", type=int, help="Runs per batch; default: the shape's own.")
@click.option("--scale", default=1.0, help="Factor on the shapes' own batch sizes.")
@click.option("--seed", default=1, help="Of the first repeat; each repeat adds one.")
@click.option("--time-scale", default=1.0, help="Factor on think times and arrivals.")
@click.option("--stream-every", default=8, help="One call in so many is streamed (time to first token); 0: none.")
@click.option("--warmup", default=0, help="Runs of other inputs sent through each system before measuring.")
@click.option("--decode-cost", default=3.0, help="Work of a generated token in prompt tokens, for the balance.")
@click.option("--out", help="Name of the result file in benchmarks/results (default: not saved).")
@click.option("--quick", is_flag=True, help="One repeat of a quarter of the batch.")
def main(
    spec: str,
    profile: str,
    blocks: int,
    block_size: int | None,
    engine_time_scale: float,
    kv_events: bool,
    plugin: bool,
    extra: tuple[str, ...],
    shapes: str,
    names: str,
    sizes: str,
    repeats: int,
    batch: int | None,
    scale: float,
    seed: int,
    time_scale: float,
    stream_every: int,
    warmup: int,
    decode_cost: float,
    out: str | None,
    quick: bool,
) -> None:
    """Measure systems side by side on one set of engines and print medians, spreads and ratios."""
    wanted = {"paper": PAPER_SHAPES, "all": tuple(WORKLOADS)}.get(shapes) or tuple(shapes.split(","))
    for shape in wanted:
        if shape not in WORKLOADS:
            raise click.BadParameter(f"no shape {shape!r}; there are {', '.join(WORKLOADS)}")
    campaign = Campaign(
        engines=spec,
        options=EngineOptions(
            profile=profile,
            blocks=blocks,
            block_size=block_size,
            time_scale=engine_time_scale,
            kv_events=kv_events,
            plugin=plugin,
            extra=extra,
        ),
        shapes=wanted,
        systems=tuple(names.split(",")),
        sizes=sizes,
        repeats=1 if quick else repeats,
        batch=batch,
        scale=scale / 4 if quick else scale,
        seed=seed,
        time_scale=time_scale,
        stream_every=stream_every,
        warmup=warmup,
        decode_cost=decode_cost,
    )
    console = Console(width=None if sys.stdout.isatty() else 190)
    try:
        result = asyncio.run(execute(campaign, console))
    except (StartFailed, ValueError) as failure:
        raise click.ClickException(str(failure)) from failure
    tables.show(console, [Measurement(**m) for m in result["measurements"]])
    for note in result["notes"]:
        console.print(f"[yellow]{note}")
    if out:
        console.print(f"saved {save(result, out)}")


if __name__ == "__main__":
    main()
