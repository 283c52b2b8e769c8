"""How far the embedded engine can be trusted: ``python -m benchmarks.replay``.

The six shapes run on one real vLLM CPU engine, without a proxy, while every call is recorded with the token ids of
its prompt and what it waits for. The very same calls then go through the embedded engine's scheduler in virtual time,
at rates fitted to other batches (`benchmarks.calibrate`) that ran in turns with the shapes: a machine with neighbours
is not as fast in one minute as in the next. What differs then is what the scheduler's model leaves out.
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, field, replace
from math import inf
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


def _fitted(config: EngineConfig, seconds: dict[str, float], console: Console) -> EngineConfig:
    """`config` at the rates that follow from how long each of `calibrate.micro`'s batches took."""
    batches = calibrate.micro(0)
    rows = [calibrate.features(config, batches[name]) for name in batches]
    rates: dict[str, Any] = dict(
        zip(calibrate.RATES, calibrate.fit(rows, [seconds[name] for name in batches]), strict=True)
    )
    console.print("fitted: " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    return replace(config, profile=replace(CPU_TINY, floor_s=0.0, **rates))


@dataclass
class _Recorded:
    """One shape on the real engine, by repeat: seconds, prompt tokens computed; and its calls."""

    seconds: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    jobs: list[calibrate.Job] = field(default_factory=list)

    async def run(self, harness: Harness, plan: Plan, name: str) -> None:
        running, session = harness.engines, harness.session
        inputs = plan.workload.make_inputs(Writer(plan.seed, harness.writer_scale), plan.sizes, plan.batch)[0]
        await running.reset(session)
        (before,) = await running.wait_idle(session)
        caller = Recorder(running)
        async with caller:
            began = time.perf_counter()
            await harness.drive(caller, plan, inputs, name)
            self.seconds.append(time.perf_counter() - began)
        (after,) = await running.wait_idle(session)
        self.computed.append((after - before).computed_tokens)
        self.jobs = self.jobs or await _jobs(harness, caller.calls)


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
    micro: dict[str, float] = {}
    recorded: dict[str, _Recorded] = {shape: _Recorded() for shape in shapes}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        running = await engines.start(campaign.engines, _OPTIONS, session)
        try:
            harness = Harness(running, session)
            await harness.learn()
            about = describe(campaign, running)
            for repeat in range(repeats):  # what the rates are fitted to and what they are judged by, in turns
                for name, jobs in calibrate.micro(100 * repeat).items():
                    micro[name] = min(micro.get(name, inf), await calibrate.real(running.urls[0], jobs))
                for shape in shapes:
                    plan = Plan(WORKLOADS[shape], SIZES[_SIZES], campaign.batch(shape), _SEED, 0)
                    await recorded[shape].run(harness, plan, f"{shape}-{repeat}")
                    console.print(f"#{repeat} {shape:16} {recorded[shape].seconds[-1]:6.2f} s")
        finally:
            await asyncio.to_thread(running.close)
    fitted = _fitted(config, micro, console)
    found: dict[str, dict[str, Any]] = {}
    for shape, real in recorded.items():
        simulated, tokens = calibrate.simulate(fitted, real.jobs)
        found[shape] = {
            "calls": len(real.jobs),
            "measured_s": real.seconds,
            "computed_tokens": real.computed,
            "simulated_s": simulated,
            "simulated_tokens": tokens,
            "shipped_s": calibrate.simulated(config, real.jobs),
            "error": simulated / min(real.seconds) - 1,
        }
        console.print(
            f"{shape:16} {min(real.seconds):6.2f} s, simulated {simulated:6.2f} s; "
            f"{min(real.computed):,.0f} tokens computed, simulated {tokens:,}"
        )
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
