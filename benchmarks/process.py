"""Start, watch and stop server processes; CPU seconds of a process and its children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parent.parent


class StartFailed(RuntimeError):
    """A server exited or was not ready in time; the message ends with the tail of its log."""


class Server:
    """One server in a process group of its own, its output in a log file. Raises `StartFailed` where there is no such
    program."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], ready_url: str) -> None:
        self.name = name
        self.ready_url = ready_url
        self.log = Path(tempfile.gettempdir()) / f"bench-{os.getpid()}-{name.replace('/', '_')}.log"
        try:
            with open(self.log, "wb") as log:
                self._process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **env},
                    cwd=ROOT,
                    start_new_session=True,
                )
        except OSError as error:
            raise StartFailed(f"{name} could not be started: {error}") from error

    def __repr__(self) -> str:
        return f"Server({self.name}, pid {self._process.pid}, {'up' if self.alive else 'down'})"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_ready(self, session: aiohttp.ClientSession, timeout_s: float = 120.0) -> None:
        """Wait for a 200 from the ready URL.

        Raises:
            StartFailed: the process ended, or `timeout_s` passed.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.alive:
                raise StartFailed(f"{self.name} exited while starting:\n{self.log_tail()}")
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.get(self.ready_url, timeout=aiohttp.ClientTimeout(total=2)) as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)
        raise StartFailed(f"{self.name} is not ready after {timeout_s:.0f} s:\n{self.log_tail()}")

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def cpu_seconds(pid: int) -> float | None:
    """User and system CPU seconds of `pid` and its live descendants, from /proc; None where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    ticks: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            process = int(entry.name)
            children.setdefault(int(fields[1]), []).append(process)
            ticks[process] = float(fields[11]) + float(fields[12])
    total, pending = 0.0, [pid]
    while pending:
        process = pending.pop()
        total += ticks.get(process, 0.0)
        pending += children.get(process, [])
    return total / os.sysconf("SC_CLK_TCK")


def stop_on_sigterm() -> None:
    """Make SIGTERM (of ``timeout``, say) unwind like Ctrl-C, so that every server started is stopped again."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
