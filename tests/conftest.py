"""Fixtures of all rooms."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import structlog
from serving import Stack


@pytest.fixture(autouse=True)
def _plain_logs() -> None:
    """Tracebacks without local variables: those take seconds each."""
    renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, renderer],
        cache_logger_on_first_use=False,
    )


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """Starts engines, fake workers and proxies; ends them with the test."""
    made = Stack()
    try:
        yield made
    finally:
        await made.close()
