"""Embedded engines as processes beside the proxy: the default workers where none is configured."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator

import click

from helium_proxy.config import Settings
from helium_proxy.workers.settings import WorkerSpec

_given: deque[int] = deque(maxlen=1_000)


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago, and another one each time: what is started on it may take a
    while to bind it, and vLLM shares a port with another without complaint."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _given:
            _given.append(port)
            return port


@contextlib.contextmanager
def engines(count: int, *, model: str, profile: str, extra: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Starts embedded engines and yields their URLs; they end with the block. They may take a second to answer."""
    processes: list[subprocess.Popen[bytes]] = []
    urls: list[str] = []
    try:
        for _ in range(count):
            port = free_port()
            command = [sys.executable, "-m", "helium_proxy.engine", "--port", str(port), "--model", model]
            # A new session, so that Ctrl-C in the terminal reaches the proxy alone, which drains first; and a pipe,
            # our end of which closes whatever ends us.
            command += ["--profile", profile, "--until-stdin-ends", *extra]
            processes.append(subprocess.Popen(command, start_new_session=True, stdin=subprocess.PIPE))
            urls.append(f"http://127.0.0.1:{port}")
        yield urls
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
            assert process.stdin is not None
            process.stdin.close()


@contextlib.contextmanager
def embedded_workers(settings: Settings) -> Iterator[Settings]:
    """`settings` as they are if they name workers, else with embedded engines started for them."""
    wanted = settings.engine
    if settings.workers or not wanted.count:
        yield settings
        return
    click.echo(
        f"no worker is configured: starting {wanted.count} embedded engines (model {wanted.model!r}, "
        f"profile {wanted.profile}); their answers are made up",
        err=True,
    )
    extra = ("--scheduling-policy", "priority")
    with engines(wanted.count, model=wanted.model, profile=wanted.profile, extra=extra) as urls:
        yield settings.model_copy(update={"workers": [WorkerSpec(url=url) for url in urls]})
