"""Headless Chromium for the page's tests: the one of the system, or a skip that names it."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WINDOW = {"width": 1440, "height": 1180}


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A Playwright browser; skips the test by name when Chromium or Playwright is not there."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Complaints(list[str]):
    """What the page said on the console as a warning or an error, and every exception it did not catch."""

    def listen(self, page: Any) -> None:
        page.on("console", lambda line: line.type in ("error", "warning") and self.append(line.text))
        page.on("pageerror", lambda error: self.append(str(error)))


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The base URL of `app`, served by uvicorn on a free port from a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
