"""What the proxy itself costs: ``python -m benchmarks.overhead``.

One zero-latency upstream (`benchmarks.stub`); in front of it, one process each and interleaved: nothing, a bare
FastAPI + aiohttp proxy, helium-proxy with all features on (tagged calls, each with another prompt) and with none, the
vllm-router package and LiteLLM. Measured: requests/s at 32 connections, latency at one connection, the delay added to
each chunk at 64 streams of 50 chunks a second, resident memory over 10,000 calls with unique prefixes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import aiohttp
import click
import uvloop
from rich.console import Console
from rich.table import Table

from helium_proxy.local import free_port

from . import build_peers, load, systems
from .campaign import Campaign, describe, order, save
from .engines import EngineOptions, Engines
from .process import Server, StartFailed, stop_on_sigterm


@dataclass
class Sample:
    """One system, one repeat."""

    system: str
    repeat: int
    rate: float
    """Requests/s at 32 connections."""
    rate_p99_ms: float
    single_p50_ms: float
    single_p99_ms: float
    chunk_p50_ms: float
    chunk_p99_ms: float
    chunks: int
    errors: int
    memory_mib: tuple[float, float] | None = None
    """Resident after 1,000 and after 10,000 calls (helium-proxy with all features only)."""


def _bare(engines: Engines, port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.bare_proxy", "--port", str(port), "--upstream", engines.urls[0]]


BARE = systems.System("bare", "peer", _bare)
NAMES = ("direct", "bare", "helium", "helium-passthrough", "vllm-router", "litellm")


def _system(name: str) -> systems.System:
    return BARE if name == "bare" else systems.find("rr" if name == "direct" else name)


async def _memory(port: int, pid: int, repeat: int) -> tuple[float, float]:
    """Resident MiB after at least 1,000 and after at least 10,000 calls."""
    sent, marks = 0, []
    for target in (1_000, 10_000):
        while sent < target:
            seen = await load.closed_loop(
                port, connections=32, seconds=1, tagged=True, nonce=f"memory{repeat}.{sent}."
            )
            if seen.requests == 0:
                raise RuntimeError("no request was answered")
            sent += seen.requests
        marks.append(load.resident_mib(pid))
    return marks[0], marks[1]


async def measure(
    name: str, upstream: Engines, session: aiohttp.ClientSession, repeat: int, seconds: float
) -> Sample:
    """One system's sample. Raises `StartFailed`."""
    system = _system(name)
    port = int(upstream.urls[0].rpartition(":")[2])
    server: Server | None = None
    tagged = system.family == "helium"
    try:
        if system.command is not None:
            server, url = await systems.start(system, upstream, session)
            port = int(url.rpartition(":")[2])
        memory = None
        if server is not None and name == "helium" and repeat == 0:
            memory = await _memory(port, server.pid, repeat)
        await load.closed_loop(port, connections=8, seconds=1, tagged=tagged, nonce=f"warm{repeat}.")
        many = await load.closed_loop(port, connections=32, seconds=seconds, tagged=tagged, nonce=f"many{repeat}.")
        one = await load.closed_loop(port, connections=1, seconds=seconds, tagged=tagged, nonce=f"one{repeat}.")
        chunk_p50, chunk_p99, chunks = await load.streams(port, count=64, tagged=tagged, nonce=f"stream{repeat}.")
    finally:
        if server is not None:
            await asyncio.to_thread(server.stop, 1.0)
    return Sample(
        system=name,
        repeat=repeat,
        rate=many.rate,
        rate_p99_ms=many.p99_ms,
        single_p50_ms=one.p50_ms,
        single_p99_ms=one.p99_ms,
        chunk_p50_ms=chunk_p50,
        chunk_p99_ms=chunk_p99,
        chunks=chunks,
        errors=many.errors + one.errors,
        memory_mib=memory,
    )


def summary(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Medians per system, and what each adds over `direct`."""

    def of(name: str, field: Callable[[Sample], float]) -> float:
        return median(field(sample) for sample in samples if sample.system == name)

    names = list(dict.fromkeys(sample.system for sample in samples))
    base_single = of("direct", lambda s: s.single_p50_ms) if "direct" in names else 0.0
    base_chunk = of("direct", lambda s: s.chunk_p50_ms) if "direct" in names else 0.0
    return {
        name: {
            "rate": of(name, lambda s: s.rate),
            "single_p50_ms": of(name, lambda s: s.single_p50_ms),
            "added_p50_ms": of(name, lambda s: s.single_p50_ms) - base_single,
            "chunk_p50_ms": of(name, lambda s: s.chunk_p50_ms),
            "chunk_added_p50_ms": of(name, lambda s: s.chunk_p50_ms) - base_chunk,
            "chunk_p99_ms": of(name, lambda s: s.chunk_p99_ms),
            "errors": max(sample.errors for sample in samples if sample.system == name),
        }
        for name in names
    }


async def run(names: list[str], repeats: int, seconds: float, console: Console) -> dict[str, Any]:
    build_peers.ensure({peer for name in names if (peer := _system(name).peer) is not None})
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    stub = Server("stub", [sys.executable, "-m", "benchmarks.stub", "--port", str(port)], {}, f"{url}/health")
    upstream = Engines("stub", [url], block_size=16, num_blocks=100_000)
    samples: list[Sample] = []
    notes: list[str] = []
    try:
        async with aiohttp.ClientSession() as session:
            await stub.wait_ready(session)
            for repeat in range(repeats):
                for name in order(names, repeat):
                    try:
                        sample = await measure(name, upstream, session, repeat, seconds)
                    except StartFailed as failure:
                        notes.append(f"{name} left out: it did not start")
                        console.print(f"[red]{failure}")
                        continue
                    samples.append(sample)
                    console.print(
                        f"{name:12} #{repeat} {sample.rate:8.0f} requests/s  {sample.single_p50_ms:.2f} ms alone  "
                        f"chunk age {sample.chunk_p50_ms:.3f} ms ({sample.chunks})  {sample.errors} errors"
                    )
    finally:
        stub.stop()
    campaign = Campaign("stub", EngineOptions(), (), tuple(names), "small", repeats)
    about = describe(campaign, upstream)
    return {
        "about": about,
        "notes": notes,
        "samples": [asdict(sample) for sample in samples],
        "summary": summary(samples),
    }


def show(console: Console, result: dict[str, Any]) -> None:
    """The table, and each bound of interest as a ratio."""
    table = Table("system", "requests/s, 32 conn.", "p50 ms, 1 conn.", "added", "chunk p50 ms", "added", "errors")
    for name, row in result["summary"].items():
        table.add_row(
            name,
            f"{row['rate']:.0f}",
            f"{row['single_p50_ms']:.3f}",
            f"{row['added_p50_ms']:.3f}",
            f"{row['chunk_p50_ms']:.3f}",
            f"{row['chunk_added_p50_ms']:.3f}",
            f"{row['errors']:.0f}",
        )
    console.print(table)
    rows = result["summary"]
    if "helium" in rows and "bare" in rows:
        ours, bare = rows["helium"], rows["bare"]
        console.print(
            f"helium ÷ bare: {ours['rate'] / bare['rate']:.2f} of its requests/s, "
            f"{ours['single_p50_ms'] - bare['single_p50_ms']:+.3f} ms at one connection, "
            f"{ours['chunk_p50_ms'] - bare['chunk_p50_ms']:+.3f} ms a chunk"
        )
    if "helium" in rows and "litellm" in rows:
        console.print(f"helium ÷ litellm: {rows['helium']['rate'] / rows['litellm']['rate']:.1f} x")
    for sample in result["samples"]:
        if sample["memory_mib"]:
            early, late = sample["memory_mib"]
            console.print(f"{sample['system']}: {early:.0f} MiB after 1,000 calls, {late:.0f} after 10,000")


@click.command()
@click.option("--systems", "names", default=",".join(NAMES), help="Comma list.")
@click.option("--repeats", default=3)
@click.option("--seconds", default=4.0, help="Of each load.")
@click.option("--out", help="Name of the result file in benchmarks/results (default: not saved).")
def main(names: str, repeats: int, seconds: float, out: str | None) -> None:
    """Measure what each proxy costs in front of a zero-latency upstream."""
    stop_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else 150)
    result = uvloop.run(run(names.split(","), repeats, seconds, console))
    show(console, result)
    if out:
        console.print(f"saved {save(result, out)}")


if __name__ == "__main__":
    main()
