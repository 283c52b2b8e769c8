"""The engines under a benchmark, started by a short specification, and their own counters.

    embedded:2          two embedded engines of this project (``--profile``, ``--blocks``)
    vllm:2              two real vLLM CPU engines, one core each (built on first use)
    http://h:1,http://h:2   engines that already run

Every engine's prefix cache is dropped between measurements (``POST /reset_prefix_cache``).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from helium_proxy.engine.profile import PROFILES
from helium_proxy.local import free_port
from helium_proxy.residency.kv_events import event_sources

from .process import ROOT, Server, StartFailed


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to start engines; each kind takes what it knows."""

    profile: str = "cpu-tiny"
    """Of the embedded engine."""
    blocks: int = 96
    """KV blocks per engine."""
    block_size: int | None = None
    """Tokens; None: the profile's, or vLLM's own for the CPU (128; it takes multiples of 32)."""
    time_scale: float = 1.0
    """Embedded only: seconds of the engine's time per second."""
    kv_events: bool = False
    """Publish KV events on ZMQ."""
    plugin: bool = False
    """vLLM only: load the pinning connector."""
    extra: tuple[str, ...] = ()
    """More arguments to the engine's command."""


@dataclass(frozen=True, slots=True)
class Counters:
    """One engine's counters, since it started."""

    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    generated_tokens: float = 0.0
    preemptions: float = 0.0
    requests: float = 0.0

    @property
    def computed_tokens(self) -> float:
        return self.prompt_tokens - self.cached_tokens

    def __sub__(self, other: Counters) -> Counters:
        return Counters(
            self.prompt_tokens - other.prompt_tokens,
            self.cached_tokens - other.cached_tokens,
            self.generated_tokens - other.generated_tokens,
            self.preemptions - other.preemptions,
            self.requests - other.requests,
        )


_COUNTERS = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:prompt_tokens_cached_total": "cached_tokens",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:request_success_total": "requests",
}


@dataclass(slots=True)
class Scrape:
    """One reading of an engine's ``/metrics``."""

    counters: Counters
    in_flight: float
    block_size: int
    num_blocks: int


def parse_metrics(text: str) -> Scrape:
    """Read vLLM's exposition; label sets of one metric are added up."""
    sums = dict.fromkeys(_COUNTERS.values(), 0.0)
    in_flight, block_size, num_blocks = 0.0, 0, 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _COUNTERS:
                sums[_COUNTERS[sample.name]] += sample.value
            elif sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
                in_flight += sample.value
            elif sample.name == "vllm:cache_config_info":
                block_size = int(sample.labels["block_size"])
                num_blocks = int(sample.labels["num_gpu_blocks"])
    return Scrape(Counters(**sums), in_flight, block_size, num_blocks)


@dataclass
class Engines:
    """A running set of engines."""

    spec: str
    urls: list[str]
    model: str = "demo"
    block_size: int = 0
    num_blocks: int = 0
    events: list[str] = field(default_factory=list)
    """ZMQ endpoint per engine when KV events are on."""
    owned: list[Any] = field(default_factory=list)
    """What `close` stops: objects with ``stop()``."""

    async def scrape(self, session: aiohttp.ClientSession) -> list[Scrape]:
        async def one(url: str) -> Scrape:
            async with session.get(f"{url}/metrics") as response:
                response.raise_for_status()
                return parse_metrics(await response.text())

        return list(await asyncio.gather(*(one(url) for url in self.urls)))

    async def wait_idle(self, session: aiohttp.ClientSession, timeout_s: float = 60.0) -> list[Counters]:
        """The counters once no engine has a request left.

        Raises:
            TimeoutError: an engine is still at work after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            scrapes = await self.scrape(session)
            if not any(scrape.in_flight for scrape in scrapes):
                return [scrape.counters for scrape in scrapes]
            if time.monotonic() > deadline:
                raise TimeoutError(f"engines still busy after {timeout_s:.0f} s: {scrapes}")
            await asyncio.sleep(0.05)

    async def reset(self, session: aiohttp.ClientSession) -> None:
        """Drop every engine's prefix cache."""
        await self.wait_idle(session)
        for url in self.urls:
            async with session.post(f"{url}/reset_prefix_cache", json={}) as response:
                response.raise_for_status()

    async def learn(self, session: aiohttp.ClientSession) -> None:
        """Ask the engines for their model, their KV events and their KV's shape."""
        async with session.get(f"{self.urls[0]}/v1/models") as response:
            response.raise_for_status()
            self.model = (await response.json())["data"][0]["id"]
        for url in self.urls:
            async with session.get(f"{url}/kv_event_sources") as response:
                known = await response.json() if response.status == 200 else {}
            self.events += [source.endpoint for source in event_sources(known, url)]
        scrape = (await self.scrape(session))[0]
        self.block_size, self.num_blocks = scrape.block_size, scrape.num_blocks

    async def tokenize(self, session: aiohttp.ClientSession, **body: object) -> list[int]:
        """Token ids by the engine's own tokenizer, of ``prompt=`` or ``messages=``."""
        async with session.post(f"{self.urls[0]}/tokenize", json={"model": self.model, **body}) as response:
            response.raise_for_status()
            return list((await response.json())["tokens"])

    def close(self) -> None:
        for server in self.owned:
            server.stop()


def _embedded_command(port: int, options: EngineOptions, events_port: int | None) -> list[str]:
    command = [sys.executable, "-m", "helium_proxy.engine", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--profile", options.profile, "--num-blocks", str(options.blocks)]
    block = options.block_size or PROFILES[options.profile].block_size
    command += ["--max-model-len", str(min(8192, (options.blocks - 1) * block))]
    command += ["--scheduling-policy", "priority"]
    if options.block_size is not None:
        command += ["--block-size", str(options.block_size)]
    if options.time_scale != 1.0:
        command += ["--time-scale", str(options.time_scale)]
    if events_port is not None:
        command += ["--kv-events", f"tcp://127.0.0.1:{events_port}"]
    return [*command, *options.extra]


async def _start_embedded(spec: str, count: int, options: EngineOptions, session: aiohttp.ClientSession) -> Engines:
    engines = Engines(spec, [])
    for index in range(count):
        port = free_port()
        events_port = free_port() if options.kv_events else None
        command = _embedded_command(port, options, events_port)
        url = f"http://127.0.0.1:{port}"
        engines.owned.append(
            Server(f"engine-{index}", command, {"VLLM_SERVER_DEV_MODE": "1"}, ready_url=f"{url}/health")
        )
        engines.urls.append(url)
    try:
        for server in engines.owned:
            await server.wait_ready(session)
    except BaseException:
        engines.close()
        raise
    return engines


def _start_vllm(spec: str, count: int, options: EngineOptions) -> Engines:
    sys.path.insert(0, str(ROOT / "tests" / "vllm"))
    import build_env  # type: ignore[import-not-found,unused-ignore]
    import engines as vllm  # type: ignore[import-not-found,unused-ignore]

    build_env.ensure(build_env.DEFAULT_VERSION)
    cores = os.cpu_count() or 1
    extra = list(options.extra)
    if options.block_size is not None:
        longest = min(8192, (options.blocks - 1) * options.block_size)
        extra = ["--block-size", str(options.block_size), "--max-model-len", str(longest), *extra]
    servers = [
        vllm.VllmEngine(
            free_port(),
            core=index % cores,
            blocks=options.blocks,
            connector=vllm.PIN_CONNECTOR if options.plugin else None,
            kv_events=options.kv_events,
            env={"VLLM_SERVER_DEV_MODE": "1"},
            extra_args=extra,
        )
        for index in range(count)
    ]
    try:
        vllm.start_engines(servers)
    except vllm.EngineFailed as failure:
        raise StartFailed(str(failure)) from failure
    return Engines(spec, [server.url for server in servers], owned=list(servers))


async def start(spec: str, options: EngineOptions, session: aiohttp.ClientSession) -> Engines:
    """Start the engines of `spec` and wait until they serve.

    Raises:
        ValueError: `spec` is of no known form.
        StartFailed: an engine did not come up (all are stopped again).
    """
    kind, _, count = spec.partition(":")
    if kind in ("http", "https"):
        engines = Engines(spec, [url.rstrip("/") for url in spec.split(",")])
    elif kind == "embedded":
        engines = await _start_embedded(spec, int(count or 2), options, session)
    elif kind == "vllm":
        engines = await asyncio.to_thread(_start_vllm, spec, int(count or 2), options)
    else:
        raise ValueError(f"{spec!r}: engines are embedded:N, vllm:N or a comma list of URLs")
    await engines.learn(session)
    return engines


def versions(spec: str) -> Sequence[str]:
    """What to note about the engines in a result file."""
    folders = sorted(path.name for path in (Path(ROOT) / ".cache").glob("vllm-venv-*") if path.is_dir())
    return folders if spec.startswith("vllm") else []
