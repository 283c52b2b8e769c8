"""``helium-proxy demo``: the same agents' calls straight to the engines and through the proxy, compared.

Both times the code of `workflows` runs, on the same engines with empty prefix caches. What is printed comes from the
clock, from the engines' own counters and from the answers themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
from rich.console import Console

from helium_proxy.demo import show
from helium_proxy.demo.engines import DemoFailed, Engines, Tokens
from helium_proxy.demo.proxy import proxy, usable_port
from helium_proxy.demo.workflows import Agent, calls, run_all
from helium_proxy.local import engines as embedded_engines

ENGINES = 2
PROFILE = "cpu-tiny"
"""Speed of the embedded engines: fitted to a real vLLM on one CPU core."""
BLOCKS, BLOCK_SIZE = 640, 16
"""Their KV cache: one engine cannot hold all the roles' handbooks, let alone what is read with them."""
_ENGINE_FLAGS = ("--num-blocks", str(BLOCKS + 1), "--block-size", str(BLOCK_SIZE), "--scheduling-policy", "priority")


@dataclass(frozen=True, slots=True)
class Measured:
    """One way of making the calls, as it went."""

    seconds: float
    """From the first call's start to the last one's end."""
    tokens: Tokens
    """By the engines' counters."""
    answers: dict[tuple[str, str], str]
    """(run, node) → answer."""


@dataclass(frozen=True, slots=True)
class Comparison:
    direct: Measured
    proxied: Measured
    differing: list[tuple[str, str]] = field(default_factory=list)
    """Calls whose answers are not equal."""


async def run(workers: list[str], *, once: bool, port: int, batch: int, model: str | None) -> int:
    """The demo; on `workers` if there are any, else on embedded engines. The process's exit status: 0 when both ways
    gave equal answers."""
    console = Console(highlight=False)
    api_key = os.environ.get("VLLM_API_KEY") if workers else None
    done = False
    main = asyncio.current_task()
    assert main is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, main.cancel)
    try:
        with _engines(workers, console) as urls:
            async with httpx.AsyncClient(timeout=30, trust_env=bool(workers)) as http:
                engines = Engines(urls, http, api_key)
                with console.status(f"waiting for {', '.join(urls)}"):
                    served = await engines.models()
                if model is not None and model not in served:
                    raise DemoFailed(f"model {model!r} is not served; there are: {', '.join(served)}")
                model = model or served[0]
                show.workload(console, batch, calls(batch))
                direct = await _direct(engines, model, batch, api_key, console)
                used = usable_port(port)
                if port and used != port:
                    console.print(f"Port {port} is taken: using {used}.")
                with proxy(engines.urls, used, api_key) as process:
                    await process.ready()
                    show.watch(console, used, once=once)
                    try:
                        proxied = await _through(engines, used, model, batch, console)
                    except DemoFailed as error:
                        raise DemoFailed(f"{error}\n{process.tail()}") from None
                    comparison = Comparison(direct, proxied, _differing(direct, proxied))
                    show.comparison(console, comparison, embedded=not workers)
                    done = not comparison.differing
                    if not once:
                        show.invitation(console, used, model)
                        await process.ended()
    except DemoFailed as error:
        console.print("[red]demo:[/]", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    except asyncio.CancelledError:
        return 0 if done else 130
    return 0 if done else 1


@contextlib.contextmanager
def _engines(workers: list[str], console: Console) -> Iterator[list[str]]:
    if workers:
        yield [url.rstrip("/").removesuffix("/v1") for url in workers]
        return
    show.engines(console, ENGINES, PROFILE, BLOCKS * BLOCK_SIZE)
    with embedded_engines(ENGINES, model="demo", profile=PROFILE, extra=_ENGINE_FLAGS) as urls:
        yield urls


async def _direct(engines: Engines, model: str, batch: int, api_key: str | None, console: Console) -> Measured:
    """Round robin, as a plain load balancer would send them."""
    clients = [AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key or "none") for url in engines.urls]
    turn = itertools.cycle(clients)
    try:
        return await _measure(engines, Agent(lambda: next(turn), model), batch, "direct, round robin", console)
    finally:
        for client in clients:
            await client.close()


async def _through(engines: Engines, port: int, model: str, batch: int, console: Console) -> Measured:
    local = DefaultAsyncHttpxClient(trust_env=False)
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=local) as client:
        return await _measure(engines, Agent(lambda: client, model), batch, "through the proxy", console)


async def _measure(engines: Engines, agent: Agent, batch: int, name: str, console: Console) -> Measured:
    await engines.settle()
    if not await engines.forget():
        agent.extra = _apart()
    before = await engines.counters()
    with show.progress(console, name, calls(batch)) as agent.answered:
        began = time.monotonic()
        try:
            await run_all(agent, batch)
        except* OpenAIError as errors:
            raise DemoFailed(f"{name}: {errors.exceptions[0]}") from None
        seconds = time.monotonic() - began
    return Measured(seconds, await engines.counters() - before, agent.answers)


def _apart() -> dict[str, Any]:
    """Makes a measurement's KV blocks its own, where caches cannot be emptied."""
    return {"cache_salt": uuid.uuid4().hex}


def _differing(direct: Measured, proxied: Measured) -> list[tuple[str, str]]:
    return sorted(call for call, answer in direct.answers.items() if proxied.answers.get(call) != answer)
