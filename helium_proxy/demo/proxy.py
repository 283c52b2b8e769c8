"""A proxy as a process of its own, started the way a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from helium_proxy.demo.engines import DemoFailed
from helium_proxy.local import free_port

_START_S = 30.0
_DRAIN_S = 5.0
_OWN = ("HELIUM_SERVER", "HELIUM_AUTH", "HELIUM_WORKERS", "HELIUM_CONFIG")
"""Settings that would make it another proxy than the demo's; all others in the environment hold."""


class ProxyProcess:
    """`helium-proxy serve` on a port of 127.0.0.1."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, workers: int, log: Path) -> None:
        self.port = port
        self._process = process
        self._workers = workers
        self._log = log

    async def ready(self) -> None:
        """Returns once all its workers are up. Raises DemoFailed."""
        deadline = time.monotonic() + _START_S
        async with httpx.AsyncClient(trust_env=False) as client:  # a proxy of the network's is not asked for us
            while time.monotonic() < deadline and self._process.poll() is None:
                with contextlib.suppress(httpx.TransportError, ValueError, KeyError):
                    answer = await client.get(f"http://127.0.0.1:{self.port}/ready")
                    if answer.json()["workers_up"] == self._workers:
                        return
                await asyncio.sleep(0.05)
        raise DemoFailed(f"the proxy did not start:\n{self.tail()}")

    async def ended(self) -> None:
        """Raises DemoFailed when it ends; it is not expected to."""
        while self._process.poll() is None:  # noqa: ASYNC110 -- a process is no event
            await asyncio.sleep(0.2)
        raise DemoFailed(f"the proxy has ended:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-3000:]


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


@contextlib.contextmanager
def proxy(workers: list[str], port: int, api_key: str | None) -> Iterator[ProxyProcess]:
    """Starts one in front of `workers`; it ends with the block."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
    environ["HELIUM_WORKERS"] = json.dumps([{"url": url, "api_key": api_key} for url in workers])
    command = [sys.executable, "-m", "helium_proxy.cli", "serve", "--port", str(port)]
    with tempfile.TemporaryDirectory(prefix="helium-demo-") as folder:
        log = Path(folder, "proxy.log")
        with log.open("wb") as sink:
            # A new session: Ctrl-C is for the demo, which then ends the proxy.
            process = subprocess.Popen(command, env=environ, stdout=sink, stderr=sink, start_new_session=True)
        try:
            yield ProxyProcess(process, port, len(workers), log)
        finally:
            process.terminate()
            try:
                process.wait(_DRAIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
