"""One vLLM engine alone on a GPU against the embedded engine's profile: ``python -m benchmarks.gpu.rates
--vllm-python PYTHON``.

The simulator's GPU profiles are rooflines of published rates (`helium_proxy.engine.profile`). This runs prefills of
several lengths and decodes in batches of several sizes on a real engine and compares their durations.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from datetime import UTC, datetime
from typing import Any

import aiohttp
import click
from rich.console import Console

from benchmarks.calibrate import Job, compare, real, tokens
from benchmarks.campaign import save
from benchmarks.gpu.run import about_gpu, build_model, engine, engine_version
from benchmarks.process import StartFailed, stop_on_sigterm
from helium_proxy.engine import EngineConfig
from helium_proxy.engine.profile import PROFILES

_OUTPUT = 64


def batches(seed: int) -> dict[str, list[Job]]:
    """Calls that start together, by name; their prompts share nothing."""
    rng = random.Random(seed)
    out = {f"prefill {n:,}": [Job(tokens(rng, n), 1)] for n in (512, 2048, 6144)}
    for count, context in ((1, 512), (8, 512), (32, 512), (64, 512), (16, 2048)):
        name = f"{count} × ({context:,} + {_OUTPUT})"
        out[name] = [Job(tokens(rng, context), _OUTPUT) for _ in range(count)]
    return out


async def measure(url: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of each batch and repeat; a first one warms up."""
    found: dict[str, list[float]] = {}
    for seed in range(repeats + 1):
        for name, jobs in batches(seed).items():
            seconds = await real(url, jobs)
            if seed:
                found.setdefault(name, []).append(seconds)
    return found


@click.command()
@click.option("--vllm-python", required=True, help="An interpreter with vLLM.")
@click.option("--shape", default="qwen3-8b", help="qwen3-8b, or tiny to try the script.")
@click.option("--gpu", default="0", help="The GPU; cpu for the CPU build.")
@click.option("--profile", default="h100-8b", type=click.Choice(list(PROFILES)))
@click.option("--blocks", default=4096)
@click.option("--repeats", default=3)
@click.option("--engine-arg", "extra", multiple=True, help="One more argument to the engine's command.")
@click.option("--out", default="gpu_rates", help="Name of the result file; empty: not saved.")
def main(vllm_python: str, shape: str, gpu: str, profile: str, blocks: int, repeats: int, **options: Any) -> None:
    """Start one engine, measure, compare, save."""
    stop_on_sigterm()
    console = Console()
    model = build_model(vllm_python, shape)
    server = engine(vllm_python, model, gpu, blocks=blocks, extra=options["extra"])

    async def run() -> tuple[str, dict[str, list[float]]]:
        async with aiohttp.ClientSession() as session:
            await server.wait_ready(session, timeout_s=900)
            version = await engine_version(session, server)
        return version, await measure(server.ready_url.removesuffix("/health"), repeats)

    try:
        version, found = asyncio.run(run())
    except StartFailed as failure:
        raise click.ClickException(str(failure)) from failure
    finally:
        server.stop()
    config = EngineConfig(profile=profile, block_size=16, num_blocks=blocks, max_model_len=8192, policy="priority")
    medians = {name: statistics.median(times) for name, times in found.items()}
    rows = compare(config, batches(0), found, medians)
    for name, row in rows.items():
        console.print(
            f"{name:20} {row['measured_s']:8.3f} s, {profile} {row['simulated_s']:8.3f} s {row['error']:+.0%}"
        )
    if options["out"]:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **about_gpu([gpu], shape, options["extra"]),
            "engine_versions": [version],
            "profile": profile,
        }
        console.print(f"saved {save({'about': about, 'rows': rows}, options['out'])}")


if __name__ == "__main__":
    main()
