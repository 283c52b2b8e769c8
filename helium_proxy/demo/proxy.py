"""A proxy as a process of its own, started the way a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from helium_proxy.demo.engines import DemoFailed
from helium_proxy.local import free_port

_START_S = 30.0
_DRAIN_S = 10.0
_OWN = ("HELIUM_SERVER", "HELIUM_AUTH", "HELIUM_WORKERS", "HELIUM_CONFIG")
"""Settings that would make it another proxy than the demo's; all others in the environment hold."""


def usable_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else a free one."""
    if not wanted:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
    return wanted


@contextlib.asynccontextmanager
async def proxy(workers: list[str], port: int, api_key: str | None) -> AsyncIterator[asyncio.subprocess.Process]:
    """Starts `helium-proxy serve` and yields it once it is ready and all workers are up. Raises DemoFailed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
    environ["HELIUM_WORKERS"] = json.dumps([{"url": url, "api_key": api_key} for url in workers])
    with tempfile.TemporaryDirectory(prefix="helium-demo-") as folder:
        log = Path(folder, "proxy.log")
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "helium_proxy.cli", "serve", "--port", str(port)),
                env=environ,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends the proxy
            )
        try:
            await _until_ready(process, f"http://127.0.0.1:{port}/ready", len(workers), log)
            yield process
        finally:
            await _end(process)


async def _until_ready(process: asyncio.subprocess.Process, url: str, workers: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    async with httpx.AsyncClient() as client:
        while time.monotonic() < deadline and process.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url)).json()["workers_up"] == workers:
                    return
            await asyncio.sleep(0.05)
    raise DemoFailed(f"the proxy did not start:\n{log.read_text(errors='replace')[-2000:]}")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), _DRAIN_S)
    except TimeoutError:
        process.kill()
        await process.wait()
