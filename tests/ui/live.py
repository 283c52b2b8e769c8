"""A real proxy with two embedded engines, in a process of its own, and Trading runs through it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from helium_proxy.local import free_port

sys.path.insert(0, str(Path(__file__).parents[1]))
from operate.load import Load

SETTINGS = {"HELIUM_ENGINE__PROFILE": "h100-8b", "HELIUM_ENGINE__COUNT": "2", "HELIUM_LOG__LEVEL": "warning"}


@contextlib.contextmanager
def proxy(*workers: str) -> Iterator[str]:
    """The base URL of a proxy in front of `workers` (none: two embedded engines), once two of them are up."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "helium-proxy"), "serve", "--port", str(port)]
    for url in workers:
        command += ["--worker", url]
    process = subprocess.Popen(command, env={**os.environ, **SETTINGS})
    base = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the proxy did not start"
            assert time.monotonic() < end, "the engines did not come up"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{base}/ready").json()["workers_up"] == 2:
                    break
            time.sleep(0.1)
        yield base
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def behind(work: Callable[[Load], Any], base: str, **options: Any) -> Iterator[threading.Thread]:
    """`work(load)` in a thread, waited for at the end; its failure is raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work(Load(base, **options)))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield thread
    thread.join(120)
    assert not thread.is_alive(), "the load did not end"
    if failed:
        raise failed[0]


async def crowd(load: Load) -> None:
    """Three Trading runs at once, which one engine alone would serve badly."""
    await asyncio.gather(*(load.trading(f"desk-{index}") for index in range(3)))
