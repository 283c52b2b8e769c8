"""How far the embedded engine can be trusted: ``python -m benchmarks.replay``.

The six shapes run on one real vLLM CPU engine, without a proxy, while every call is recorded with the token ids of
its prompt and what it waits for. The very same calls then go through the embedded engine's scheduler in virtual time,
at rates that were fitted in the same hour to other batches (`benchmarks.calibrate`): a machine with neighbours is not
as fast on one day as on another. What differs then is what the scheduler's model leaves out.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import replace
from typing import Any

import aiohttp
import click
from rich.console import Console

from helium_proxy.engine import EngineConfig
from helium_proxy.engine.profile import CPU_TINY

from . import calibrate, engines
from .campaign import Campaign, describe, save
from .client import HttpCaller
from .engines import EngineOptions, Engines
from .harness import Harness, Plan
from .process import stop_on_sigterm
from .workloads import PAPER_SHAPES, SIZES, WORKLOADS, Call, Writer

_SIZES, _SCALE, _SEED = "small", 0.15, 1
_OPTIONS = EngineOptions(blocks=96, block_size=128)


class Recorder(HttpCaller):
    """Remembers the calls it was asked for."""

    def __init__(self, running: Engines) -> None:
        super().__init__(running.urls, running.model)
        self.calls: list[Call] = []

    async def complete(self, call: Call) -> str:
        self.calls.append(call)
        return await super().complete(call)


async def _fitted(url: str, config: EngineConfig, repeats: int, console: Console) -> EngineConfig:
    """`config` at the rates that the engine has now."""
    batches = calibrate.micro(0)
    best: dict[str, float] = {}
    for seed in range(repeats):
        for name, jobs in calibrate.micro(100 * seed).items():
            best[name] = min(best.get(name, float("inf")), await calibrate.real(url, jobs))
    rows = [calibrate.features(config, batches[name]) for name in batches]
    rates = dict(zip(calibrate.RATES, calibrate.fit(rows, [best[name] for name in batches]), strict=True))
    console.print("fitted: " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    return replace(config, profile=replace(CPU_TINY, floor_s=0.0, **rates))


async def _jobs(harness: Harness, calls: list[Call]) -> list[calibrate.Job]:
    """The recorded calls by token ids, each after the calls that its parents' names mean."""
    position = {(call.run, call.node): index for index, call in enumerate(calls)}
    jobs = []
    for call in calls:
        prompt = await harness.engines.tokenize(
            harness.session, messages=list(call.messages), add_generation_prompt=True
        )
        after = tuple(position[call.run, parent] for parent in call.parents)
        jobs.append(calibrate.Job(prompt, call.max_tokens, after))
    return jobs


async def run(repeats: int, shapes: list[str], console: Console) -> dict[str, Any]:
    config = EngineConfig(
        profile=CPU_TINY, block_size=_OPTIONS.block_size, num_blocks=_OPTIONS.blocks, policy="priority",
        max_model_len=calibrate.LIMIT,
    )  # fmt: skip
    campaign = Campaign("vllm:1", _OPTIONS, tuple(shapes), ("rr",), _SIZES, repeats, scale=_SCALE)
    found: dict[str, dict[str, Any]] = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        running = await engines.start(campaign.engines, _OPTIONS, session)
        try:
            harness = Harness(running, session)
            await harness.learn()
            about = describe(campaign, running)
            fitted = await _fitted(running.urls[0], config, max(2, repeats), console)
            for shape in shapes:
                plan = Plan(WORKLOADS[shape], SIZES[_SIZES], campaign.batch(shape), _SEED, 0)
                inputs = plan.workload.make_inputs(Writer(_SEED, harness.writer_scale), plan.sizes, plan.batch)[0]
                took, computed, jobs = list[float](), list[float](), list[calibrate.Job]()
                for repeat in range(repeats):
                    await running.reset(session)
                    (before,) = await running.wait_idle(session)
                    async with Recorder(running) as caller:
                        began = time.perf_counter()
                        await harness.drive(caller, plan, inputs, f"{shape}-{repeat}")
                        took.append(time.perf_counter() - began)
                        (after,) = await running.wait_idle(session)
                        computed.append((after - before).computed_tokens)
                        jobs = jobs or await _jobs(harness, caller.calls)
                simulated, tokens = calibrate.simulate(fitted, jobs)
                found[shape] = {
                    "calls": len(jobs),
                    "measured_s": took,
                    "computed_tokens": computed,
                    "simulated_s": simulated,
                    "simulated_tokens": tokens,
                    "shipped_s": calibrate.simulated(config, jobs),
                    "error": simulated / min(took) - 1,
                }
                console.print(
                    f"{shape:16} {min(took):6.2f} s, simulated {simulated:6.2f} s; "
                    f"{min(computed):,.0f} tokens computed, simulated {tokens:,}"
                )
        finally:
            await asyncio.to_thread(running.close)
    return {"about": about, "shapes": found}


@click.command()
@click.option("--repeats", default=3, help="Of each shape; the fastest counts.")
@click.option("--shapes", default=",".join(PAPER_SHAPES), help="Comma list.")
@click.option("--out", help="Name of the result file in benchmarks/results (default: not saved).")
def main(repeats: int, shapes: str, out: str | None) -> None:
    """Run the six shapes on one real engine and replay them on the embedded one's scheduler."""
    stop_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 150)
    result = asyncio.run(run(repeats, shapes.split(","), console))
    if out:
        console.print(f"saved {save(result, out)}")


if __name__ == "__main__":
    main()
