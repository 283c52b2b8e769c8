"""Two vLLM engines on one machine with a GPU, the usual systems in front: ``python -m benchmarks.gpu.run``.

Needs an interpreter that has vLLM (``--vllm-python``); nothing is downloaded. The engines share one GPU
(``--gpus 0,0``) or have one each (``--gpus 0,1``). Their KV is held to ``--blocks`` blocks, so that a batch's working
set is several times what they hold. ``--mps`` gives each engine of one GPU an equal part of it (see `mps`) instead of
letting them take turns. ``--shape tiny --gpus cpu,cpu`` with the CPU build of vLLM tries the script where there is no
GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import click
from rich.console import Console

from benchmarks import tables
from benchmarks.campaign import Campaign, execute, save
from benchmarks.engines import EngineOptions
from benchmarks.gpu import mps
from benchmarks.process import ROOT, Server, StartFailed, stop_on_sigterm
from benchmarks.stats import Measurement
from benchmarks.workloads import PAPER_SHAPES, SIZES, WORKLOADS
from helium_proxy.local import free_port

MODEL = "demo"
_BLOCK = 16
"""Tokens a KV block holds on a GPU, by vLLM's default."""


def build_model(python: str, shape: str) -> Path:
    """The folder of the model of this shape, written on first use."""
    model = ROOT / ".cache" / "models" / f"gpu-{shape}"
    if not (model / "shape.json").exists():
        script = Path(__file__).with_name("make_model.py")
        subprocess.run([python, str(script), str(model), "--shape", shape], check=True)
    return model


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of KV a token takes in bfloat16."""
    config = json.loads((model / "config.json").read_text())
    return 2 * 2 * int(config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])


def cards(places: list[str]) -> list[str]:
    """Names and memory of the GPUs at `places`; empty where there is none."""
    which = ",".join(sorted(set(places)))
    command = ["nvidia-smi", "-i", which, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def about_gpu(places: list[str], shape: str, extra: tuple[str, ...]) -> dict[str, Any]:
    """What a result file says of the GPU and of how its engines were started."""
    environment = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("VLLM_")]
    return {"gpus": ",".join(places), "cards": cards(places), "model": shape, "engine_args": [*extra, *environment]}


def engine(
    python: str,
    model: Path,
    gpu: str,
    *,
    blocks: int,
    extra: tuple[str, ...],
    sharing: int = 1,
    env: Mapping[str, str] | None = None,
) -> Server:
    """One vLLM API server on a port of its own, one of `sharing` on its GPU; started, not yet ready.

    Its KV is given in bytes: engines that start at the same time on one GPU and measure what is left of its memory
    would see each other's half-loaded weights.
    """
    port, endpoint = free_port(), f"tcp://*:{free_port()}"
    publish = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint, "topic": "kv-events"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num-gpu-blocks-override", str(blocks), "--max-model-len", "8192"]
    command += ["--scheduling-policy", "priority", "--enable-prompt-tokens-details"]
    command += ["--kv-events-config", json.dumps(publish)]
    if gpu != "cpu":
        command += ["--gpu-memory-utilization", str(round(0.9 / sharing, 3))]
        command += ["--kv-cache-memory-bytes", str(blocks * _BLOCK * kv_bytes_per_token(model))]
    env = {
        **(env or {}),
        "CUDA_VISIBLE_DEVICES": "" if gpu == "cpu" else gpu,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return Server(f"vllm-{port}", [*command, *extra], env, f"http://127.0.0.1:{port}/health")


async def warm_up(session: aiohttp.ClientSession, url: str) -> None:
    """A few concurrent calls, so that kernels compiled at first use are not in the first system's time."""

    async def call(number: int) -> None:
        body = {"model": MODEL, "prompt": f"{number} " * 500 * (number + 1), "max_tokens": 16, "ignore_eos": True}
        async with session.post(url, json=body) as response:
            response.raise_for_status()
            await response.read()

    await asyncio.gather(*(call(number) for number in range(5)))


async def engine_version(session: aiohttp.ClientSession, server: Server) -> str:
    """What a ready engine says of itself."""
    async with session.get(server.ready_url.replace("/health", "/version")) as response:
        return f"vllm {(await response.json())['version']}"


async def measure(
    servers: list[Server], campaign: Campaign, about: dict[str, Any], console: Console, out: str | None
) -> dict[str, Any]:
    """Every measurement; after each the result so far is saved under the name `out`, with what `about` adds.

    Raises:
        StartFailed: an engine did not come up.
    """
    async with aiohttp.ClientSession() as session:
        for server in servers:
            await server.wait_ready(session, timeout_s=900)
        about["engine_versions"] = [await engine_version(session, servers[0])]
        for server in servers * 2:
            await warm_up(session, server.ready_url.replace("/health", "/v1/completions"))

    def checkpoint(result: dict[str, Any]) -> None:
        result["about"] |= about
        if out:
            save(result, out)

    result = await execute(campaign, console, checkpoint)
    checkpoint(result)
    return result


def batches_of(pairs: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """(shape, runs) of each ``SHAPE=RUNS``. Raises `click.BadParameter`."""
    found = []
    for pair in pairs:
        shape, _, runs = pair.partition("=")
        if shape not in WORKLOADS or not runs.isdigit():
            raise click.BadParameter(f"{pair!r} is not SHAPE=RUNS")
        found.append((shape, int(runs)))
    return tuple(found)


@click.command()
@click.option("--vllm-python", default=sys.executable, help="An interpreter with vLLM.")
@click.option("--shape", default="qwen3-8b", help="qwen3-8b, or tiny to try the script.")
@click.option("--gpus", default="0,0", help="GPU of each engine; cpu for the CPU build.")
@click.option("--mps", "service", is_flag=True, help="Engines that share a GPU have a part of it each.")
@click.option("--blocks", default=4096, help="KV blocks per engine.")
@click.option("--sizes", default="P1", type=click.Choice(list(SIZES)), help="Prompt sizes.")
@click.option("--scale", default=4.0, help="Factor on the shapes' batches.")
@click.option("--batch", "batches", multiple=True, metavar="SHAPE=RUNS", help="A shape's batch, instead.")
@click.option("--shapes", default=",".join(PAPER_SHAPES))
@click.option("--systems", default="rr,sglang,vllm-router,vllm-router-kv,vllm-router-program,helium,helium-plan")
@click.option("--repeats", default=3)
@click.option("--engine-arg", "extra", multiple=True, help="One more argument to the engines' command.")
@click.option("--out", default="gpu", help="Name of the result file; empty: not saved.")
def main(vllm_python: str, shape: str, gpus: str, service: bool, blocks: int, sizes: str, **options: Any) -> None:
    """Build the model, start the engines, measure, save."""
    stop_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 190)
    model = build_model(vllm_python, shape)
    places = gpus.split(",")
    about = {**about_gpu(places, shape, options["extra"]), "mps": service}
    servers: list[Server] = []
    try:
        with contextlib.ExitStack() as stack:
            env = stack.enter_context(mps.service()) if service else {}
            stack.callback(lambda: [server.stop() for server in servers])
            for gpu in places:
                sharing = places.count(gpu)
                part = {**env, **mps.part(sharing)} if service else env
                servers.append(
                    engine(vllm_python, model, gpu, blocks=blocks, extra=options["extra"], sharing=sharing, env=part)
                )
            campaign = Campaign(
                engines=",".join(server.ready_url.removesuffix("/health") for server in servers),
                options=EngineOptions(blocks=blocks, extra=options["extra"]),
                shapes=tuple(options["shapes"].split(",")),
                systems=tuple(options["systems"].split(",")),
                sizes=sizes,
                repeats=options["repeats"],
                scale=options["scale"],
                batches=batches_of(options["batches"]),
            )
            result = asyncio.run(measure(servers, campaign, about, console, options["out"]))
    except (OSError, subprocess.CalledProcessError, StartFailed) as failure:
        raise click.ClickException(str(failure)) from failure
    tables.show(console, [Measurement(**m) for m in result["measurements"]])
    if options["out"]:
        console.print(f"saved as {options['out']}.json in benchmarks/results")


if __name__ == "__main__":
    main()
