"""Measure systems side by side: ``python -m benchmarks.run --help``."""

from __future__ import annotations

import asyncio
import sys

import click
from rich.console import Console

from . import tables
from .campaign import Campaign, execute, save
from .engines import EngineOptions
from .process import StartFailed, stop_on_sigterm
from .stats import Measurement
from .workloads import PAPER_SHAPES, SIZES, WORKLOADS


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
@click.option("--kv-divisor", type=float, help="Embedded: KV of all engines = the batch's working set over this.")
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
    kv_divisor: float | None,
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
        batches=tuple((shape, batch) for shape in wanted) if batch else (),
        scale=scale / 4 if quick else scale,
        kv_divisor=kv_divisor,
        seed=seed,
        time_scale=time_scale,
        stream_every=stream_every,
        warmup=warmup,
        decode_cost=decode_cost,
    )
    stop_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 190)
    try:
        result = asyncio.run(execute(campaign, console, lambda so_far: out and save(so_far, out)))
    except (StartFailed, ValueError) as failure:
        raise click.ClickException(str(failure)) from failure
    tables.show(console, [Measurement(**m) for m in result["measurements"]])
    for note in result["notes"]:
        console.print(f"[yellow]{note}")
    if out:
        console.print(f"saved {save(result, out)}")


if __name__ == "__main__":
    main()
