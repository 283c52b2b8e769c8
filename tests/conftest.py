"""Fixtures of all rooms."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import structlog
from serving import Stack


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    """Tracebacks without local variables: those take seconds each. What a command that ran here has set up ends with
    the test: it would write into what others print."""
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, renderer],
        cache_logger_on_first_use=False,
    )
    yield
    root = logging.getLogger()
    root.handlers[:] = [h for h in root.handlers if not isinstance(h.formatter, structlog.stdlib.ProcessorFormatter)]
    root.setLevel(logging.WARNING)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """Starts engines, fake workers and proxies; ends them with the test."""
    made = Stack()
    try:
        yield made
    finally:
        await made.close()
